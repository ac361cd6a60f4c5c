// Plays kernel launches on one CPU thread: a CUDA thread is a fiber, a barrier switches to the next one.
//
// Always compiled without -fsanitize, so that only the kernels are instrumented; COVER_ASAN and COVER_TSAN tell which
// sanitizer watches them and must be told of the fibers.
#include "runtime.h"

#include <sys/mman.h>

#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef COVER_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef COVER_TSAN
#include <sanitizer/tsan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Saves the callee-saved registers on the current stack, its top in *from, and goes on with the stack `to`. (ucontext
// would do, but for the sanitizers: they intercept it, and clear the bounds of all local arrays at each switch.)
extern "C" void cover_switch_stack(void** from, void* to);
asm(R"(
.text
.globl cover_switch_stack
cover_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace cuda_on_cpu {
namespace {

constexpr size_t kStack = 256 << 10, kPage = 4096;
constexpr size_t kStaticShared = 48 << 10, kRedZone = 256;
constexpr unsigned kWarp = 32, kMaxThreads = 1024, kMaxGridYZ = 65535;

enum class State { ready, at_barrier, in_exchange, done };

struct Fiber {
  char* stack;
  void* top;                   // of its stack, while it does not run
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;
  State state;
  int barrier;           // line of the barrier that it waits at
  Together instruction;  // that it waits in for the other lanes
  Message message;       // to them
  uint3 index;
  unsigned number;  // in its block
};

struct Array {
  char* address;
  size_t size;
};

std::vector<Fiber> pool;      // made once, then reused by every launch
std::vector<Fiber*> threads;  // of the current block, in the order of threadIdx
Fiber* current;
Fiber host;  // the stack of the launching thread
const void* host_stack;
size_t host_stack_size;
const std::function<void()>* thread_body;
std::map<int, Array> static_shared;  // declaration -> array of the current block
size_t static_shared_end;            // in the arena
Array arena, dynamic_shared_array;
size_t shared_limit = 227 << 10;               // of a kernel that asks for more than kStaticShared
std::map<const void*, size_t> allowed_shared;  // by cudaFuncSetAttribute
cudaError_t last_error = cudaSuccess;
std::exception_ptr failure;  // of a thread
Schedule schedule = Schedule::forward;
std::mt19937 generator;
Message messages[kMaxThreads];    // of the current block's last exchange in each warp
int compiled_for = 90;            // the architecture that the kernels pretend to be compiled for
char launch_begins, launch_ends;  // what ThreadSanitizer orders memory by

#ifdef COVER_TSAN
void release(void* object) {
  __tsan_release(object);
}
void acquire(void* object) {
  __tsan_acquire(object);
}
void enter(Fiber* fiber) {
  __tsan_switch_to_fiber(fiber->tsan, __tsan_switch_to_fiber_no_sync);
}
#else
void release(void*) {}
void acquire(void*) {}
void enter(Fiber*) {}
#endif

void switch_to([[maybe_unused]] const void* stack, [[maybe_unused]] size_t size, Fiber* from, Fiber* to) {
#ifdef COVER_ASAN
  __sanitizer_start_switch_fiber(&from->fake_stack, stack, size);
#endif
  enter(to);
  cover_switch_stack(&from->top, to->top);
#ifdef COVER_ASAN
  // back from wherever; a fiber learns here where the host's stack lies
  const bool is_host = from == &host;
  __sanitizer_finish_switch_fiber(from->fake_stack, is_host ? nullptr : &host_stack,
                                  is_host ? nullptr : &host_stack_size);
#endif
}

void resume(Fiber* fiber) {
  current = fiber;
  threadIdx = fiber->index;
  switch_to(fiber->stack, kStack, &host, fiber);
  if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
}

void yield() {
  switch_to(host_stack, host_stack_size, current, &host);
}

void fiber_main() {
#ifdef COVER_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_size);
#endif
  for (;;) {
    acquire(&launch_begins);
    try {
      (*thread_body)();
    } catch (...) {
      failure = std::current_exception();
    }
    release(&launch_ends);
    current->state = State::done;
    yield();
  }
}

// Memory straight from the kernel: its shadow is clean whatever lay at that address before.
char* map_memory(size_t size) {
  void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(p);
}

Fiber make_fiber() {
  Fiber fiber{};
  fiber.stack = map_memory(kStack);
  mprotect(fiber.stack, kPage, PROT_NONE);  // an overflow faults
  // what cover_switch_stack pops: six registers and the address to return to; one word more aligns the stack
  void** top = reinterpret_cast<void**>(fiber.stack + kStack) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(&fiber_main);
  fiber.top = top;
#ifdef COVER_TSAN
  fiber.tsan = __tsan_create_fiber(0);
#endif
  return fiber;
}

// Orders what the block's threads did before a barrier ahead of what they do after it. All acquire at one instant:
// had each acquired when it resumes, it would also see what a faster thread did past the barrier.
void order_threads() {
#ifdef COVER_TSAN
  static char objects[1 << 16];
  static unsigned next;
  char* object = &objects[next++ % sizeof(objects)];
  for (Fiber* f : threads) enter(f), release(object);
  for (Fiber* f : threads) enter(f), acquire(object);
  enter(&host);
#endif
}

[[noreturn]] void fail(const std::string& what, const Fiber& fiber) {
  const auto triple = [](uint3 v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
  };
  throw std::runtime_error(what + " in block " + triple(blockIdx) + ", thread " + triple(fiber.index));
}

template <class T>
void put_in_turn(std::vector<T>& items) {
  if (schedule == Schedule::reverse) std::reverse(items.begin(), items.end());
  if (schedule == Schedule::random) std::shuffle(items.begin(), items.end(), generator);
}

// Opens an array of the block's arena to AddressSanitizer.
Array take_shared(size_t offset, size_t size) {
#ifdef COVER_ASAN
  __asan_unpoison_memory_region(arena.address + offset, size);
#endif
  return {arena.address + offset, size};
}

uint3 index_in(const dim3& size, size_t i) {
  return {static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
          static_cast<unsigned>(i / size.x / size.y)};
}

void run_threads() {
  std::vector<Fiber*> turn = threads;
  put_in_turn(turn);
  for (Fiber* f : turn)
    if (f->state == State::ready) resume(f);
}

// Hands out the messages of the warps whose lanes are all there; false where there are none. Memory is not ordered.
bool exchange_messages() {
  bool any = false;
  for (size_t warp = 0; warp < threads.size(); warp += kWarp) {
    const size_t end = std::min(warp + kWarp, threads.size());
    const auto waits = [](const Fiber* f) { return f->state == State::in_exchange; };
    const auto first = std::find_if(&threads[warp], &threads[end - 1] + 1, waits);
    if (first == &threads[end - 1] + 1) continue;
    for (size_t i = warp; i < warp + kWarp; i++) {
      if (i >= end || !waits(threads[i])) fail("a lane does not come to an instruction of the whole warp", **first);
      if (threads[i]->instruction != (*first)->instruction)
        fail("the lanes of a warp are at different instructions of the whole warp", *threads[i]);
      messages[i] = threads[i]->message;
      threads[i]->state = State::ready;
    }
    any = true;
  }
  return any;
}

void run_block(size_t shared_size) {
  // rotated, so that ThreadSanitizer does not take the same thread of two blocks for one
  static size_t rotation;
  rotation++;
  for (size_t i = 0; i < threads.size(); i++) {
    Fiber& f = pool[(i + rotation) % pool.size()];
    f.state = State::ready;
    f.index = index_in(blockDim, i);
    f.number = i;
    threads[i] = &f;
  }
  static_shared.clear();
  static_shared_end = kRedZone + shared_size;
  const size_t arena_size = static_shared_end + kStaticShared;
  arena = {map_memory(arena_size), arena_size};
  std::memset(arena.address, 0xff, arena.size);  // NaN in every type
#ifdef COVER_ASAN
  __asan_poison_memory_region(arena.address, arena.size);
#endif
  dynamic_shared_array = take_shared(kRedZone, shared_size);
  // the host never acquires before the launch ends, so this orders nothing between blocks
  release(&launch_begins);
  for (;;) {
    run_threads();
    if (exchange_messages()) continue;
    const Fiber* waiting = nullptr;
    for (const Fiber* f : threads)
      if (f->state == State::at_barrier) waiting = f;
    if (!waiting) break;
    for (const Fiber* f : threads) {
      if (f->state == State::done) fail("a thread exited while others wait at __syncthreads()", *f);
      if (f->barrier != waiting->barrier) fail("threads wait at different __syncthreads()", *f);
    }
    order_threads();
    for (Fiber* f : threads) f->state = State::ready;
  }
#ifdef COVER_ASAN
  __asan_unpoison_memory_region(arena.address, arena.size);
#endif
  munmap(arena.address, arena.size);
}

}  // namespace

void set_schedule(Schedule order, unsigned seed) {
  schedule = order;
  generator.seed(seed);
}

void set_shared_limit(size_t bytes) {
  shared_limit = bytes;
}

void barrier(int line) {
  current->state = State::at_barrier;
  current->barrier = line;
  yield();
}

const Message* exchange(Together instruction, const Message& mine) {
  current->state = State::in_exchange;
  current->instruction = instruction;
  current->message = mine;
  yield();
  return &messages[current->number / kWarp * kWarp];
}

unsigned lane() {
  return current->number % kWarp;
}

void set_architecture(int architecture) {
  compiled_for = architecture;
}

int architecture() {
  return compiled_for;
}

void* dynamic_shared_bytes() {
  return dynamic_shared_array.address;
}

void* shared_bytes(int declaration, size_t size, size_t alignment) {
  auto [entry, is_new] = static_shared.try_emplace(declaration);
  if (is_new) {
    const size_t step = std::max(alignment, kRedZone);
    const size_t offset = (static_shared_end + step + step - 1) / step * step;
    static_shared_end = offset + size;
    if (static_shared_end + kRedZone > arena.size) throw std::logic_error("too much static shared memory");
    entry->second = take_shared(offset, size);
  }
  return entry->second.address;
}

cudaError_t allow_shared_bytes(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > shared_limit) return last_error = cudaErrorInvalidValue;
  allowed_shared[kernel] = bytes;
  return cudaSuccess;
}

void run(const void* kernel, const Configuration& c, const std::function<void()>& thread) {
  const size_t block_size = static_cast<size_t>(c.block.x) * c.block.y * c.block.z;
  const size_t blocks = static_cast<size_t>(c.grid.x) * c.grid.y * c.grid.z;
  const size_t allowed = allowed_shared.count(kernel) ? allowed_shared[kernel] : kStaticShared;
  if (!block_size || block_size > kMaxThreads || c.block.z > 64 || !blocks || c.grid.x > 0x7fffffffu ||
      c.grid.y > kMaxGridYZ || c.grid.z > kMaxGridYZ) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  if (c.shared_bytes > allowed) {
    last_error = cudaErrorInvalidValue;
    return;
  }
  thread_body = &thread;
  blockDim = c.block, gridDim = c.grid;
  pool.reserve(kMaxThreads);  // fibers must stay where they are
  while (pool.size() < block_size) pool.push_back(make_fiber());
  threads.resize(block_size);
#ifdef COVER_TSAN
  host.tsan = __tsan_get_current_fiber();
#endif
  std::vector<size_t> turn(blocks);
  std::iota(turn.begin(), turn.end(), 0);
  put_in_turn(turn);
  try {
    for (size_t i : turn) {
      blockIdx = index_in(c.grid, i);
      run_block(c.shared_bytes);
    }
  } catch (...) {
    pool.clear();  // the fibers are abandoned where they stand
    throw;
  }
  acquire(&launch_ends);
}

}  // namespace cuda_on_cpu

cudaError_t cudaGetLastError() {
  return std::exchange(cuda_on_cpu::last_error, cudaSuccess);
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = static_cast<int>(cuda_on_cpu::shared_limit);
  return cudaSuccess;
}
