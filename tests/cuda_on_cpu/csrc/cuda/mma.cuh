// Stands for csrc/cuda/mma.cuh in the harness: the same two instructions, played between the 32 fibers of a warp.
//
// The layout of the matrices is written down there. A lane reads the shared memory that it names, so that the
// sanitizers see who reads what; what it then holds reaches the others in a message.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "types.cuh"

namespace cover {
namespace cuda {

constexpr int kMmaArchitecture = 80;
constexpr bool kHasMma = true;

template <class T>
float half_of(uint32_t word, int i) {
  const uint16_t bits = static_cast<uint16_t>(word >> 16 * i);
  T value;
  static_assert(sizeof(value) == sizeof(bits));
  std::memcpy(&value, &bits, sizeof(bits));
  return load(&value);
}

template <class T>
void mma(const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], float (&d)[4]) {
  float mine[12];  // 8 numbers of a, 4 of b
  for (int i = 0; i < 8; i++) mine[i] = half_of<T>(a[i / 2], i % 2);
  for (int i = 0; i < 4; i++) mine[8 + i] = half_of<T>(b[i / 2], i % 2);
  cuda_on_cpu::Message message{};
  std::memcpy(&message, mine, sizeof(mine));
  const auto* const of_lane = cuda_on_cpu::exchange(cuda_on_cpu::Together::mma, message);
  float other[32][12];
  for (int lane = 0; lane < 32; lane++) std::memcpy(other[lane], of_lane + lane, sizeof(other[lane]));
  const int g = cuda_on_cpu::lane() / 4, t = cuda_on_cpu::lane() % 4;
  for (int i = 0; i < 4; i++) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; k++)
      sum += double(other[row % 8 * 4 + k % 8 / 2][row / 8 * 2 + k / 8 * 4 + k % 2]) *
             other[column * 4 + k % 8 / 2][8 + k / 8 * 2 + k % 2];
    d[i] = static_cast<float>(sum);
  }
}

inline void load_matrices(const void* row, uint32_t (&value)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::logic_error("load_matrices: a row is not at a multiple of 16");
  cuda_on_cpu::Message message{};
  std::memcpy(&message, row, 16);
  const auto* const of_lane = cuda_on_cpu::exchange(cuda_on_cpu::Together::load_matrices, message);
  const int g = cuda_on_cpu::lane() / 4, t = cuda_on_cpu::lane() % 4;
  for (int i = 0; i < 4; i++) value[i] = of_lane[8 * i + g].word[t];
}

}  // namespace cuda
}  // namespace cover
