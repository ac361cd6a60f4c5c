// What rewritten kernels call: launches, shared memory, barriers. __init__.py tells how it works.
#pragma once

#include <cstddef>
#include <functional>
#include <tuple>

#include <cuda_runtime.h>

namespace cuda_on_cpu {

// <<<grid, block, bytes of dynamic shared memory, stream>>>
struct Configuration {
  dim3 grid, block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
};

// Order in which blocks, and the threads of a block between two barriers, take their turns.
enum class Schedule { forward, reverse, random };
void set_schedule(Schedule schedule, unsigned seed);

// What the device claims to allow a block, in bytes.
void set_shared_limit(size_t bytes);

// What the kernels claim to be compiled for, such as 90.
void set_architecture(int architecture);

// Runs `thread` once for each thread of the grid. Throws std::runtime_error for what CUDA leaves undefined: threads
// that wait at different barriers, or that exit while others wait.
void run(const void* kernel, const Configuration& configuration, const std::function<void()>& thread);

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Configuration& configuration, const Arguments&... arguments) {
  const std::tuple<std::remove_const_t<Parameters>...> parameters(arguments...);
  run(reinterpret_cast<const void*>(kernel), configuration, [&] { std::apply(kernel, parameters); });
}

void* dynamic_shared_bytes();
void* shared_bytes(int declaration, size_t size, size_t alignment);

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(dynamic_shared_bytes());
}

// The array of one declaration, the same for all threads of a block.
template <class T>
T& shared(int declaration) {
  return *static_cast<T*>(shared_bytes(declaration, sizeof(T), alignof(T)));
}

}  // namespace cuda_on_cpu
