// Fibers begin on their own stacks with makecontext and then change places with _setjmp and _longjmp, which make no
// system call.
#include "emulation.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

extern "C" __attribute__((weak)) void stand_in_launch(void* stream, const std::function<void()>& kernel);

namespace emulated {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kSharedLimit = 48 << 10;
constexpr int kMostThreads = 1024;
constexpr int kGarbage = 0xA5;

struct Barrier {
  const char* what = nullptr;
  int expected = 0;
  int arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  Barrier barrier;
  alignas(8) char slots[2][kWarp][kExchangeBytes];  // of this exchange, and of the last one, which may still be read
};

struct Fiber {
  Thread index = {};
  int number = 0;
  jmp_buf state;
  char* stack = nullptr;
  bool has_started = false;
  bool is_done = false;
  const Barrier* awaited = nullptr;
  unsigned awaited_generation = 0;
  unsigned exchanges = 0;
};

std::string failure;
int order_seed = 0;
std::vector<Shared> shared_objects;
std::set<const void*> launched;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
Barrier block_barrier;
Fiber* current = nullptr;
dim3 block, block_threads, grid;
const std::function<void()>* body = nullptr;
jmp_buf scheduler;

void fail(const std::string& message) {
  if (failure.empty()) failure = message;
}

void yield() {
  if (_setjmp(current->state) == 0) _longjmp(scheduler, 1);
}

void wait_at(Barrier& barrier, const char* what) {
  if (barrier.arrived == 0) barrier.what = what;
  if (strcmp(barrier.what, what) != 0) {
    fail("threads that must do the same are in " + std::string(barrier.what) + " and " + what);
  }
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  current->awaited = &barrier;
  current->awaited_generation = generation;
  yield();
  current->awaited = nullptr;
}

// A fiber lives on for the same thread of the next block.
void begin_fiber() {
  for (;;) {
    (*body)();
    current->is_done = true;
    yield();
  }
}

void* new_stack() {
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stack == MAP_FAILED) {
    perror("emulation: no memory for a fiber's stack");
    abort();
  }
  return stack;
}

void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) != 0) {
    current = nullptr;
    return;
  }
  if (fiber.has_started) _longjmp(fiber.state, 1);
  fiber.has_started = true;
  if (fiber.stack == nullptr) fiber.stack = static_cast<char*>(new_stack());
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = fiber.stack;
  start.uc_stack.ss_size = kStackBytes;
  start.uc_link = nullptr;
  makecontext(&start, begin_fiber, 0);
  setcontext(&start);
}

bool is_waiting(const Fiber& fiber) {
  return fiber.awaited != nullptr && fiber.awaited->generation == fiber.awaited_generation;
}

void poison_shared() {
  for (const Shared& object : shared_objects) memset(object.storage, kGarbage, object.bytes);
}

// The numbers 0..count-1 in the order that was asked for.
std::vector<int> turns(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (order_seed == 1) std::reverse(order.begin(), order.end());
  if (order_seed > 1) std::shuffle(order.begin(), order.end(), std::minstd_rand(order_seed));
  return order;
}

// Lets the lanes of a warp take turns until all of them have ended or wait for other warps. Whether any could go on.
bool run_ahead(int warp, const std::vector<int>& lanes, int* done) {
  bool has_moved = false;
  for (bool moves = true; moves && failure.empty();) {
    moves = false;
    for (int lane : lanes) {
      if (lane >= warps[warp].barrier.expected) continue;
      Fiber& fiber = fibers[warp * kWarp + lane];
      if (fiber.is_done || is_waiting(fiber)) continue;
      resume(fiber);
      moves = has_moved = true;
      *done += fiber.is_done;
      if (!failure.empty()) break;
    }
  }
  return has_moved;
}

// Each warp runs as far ahead of the others as barriers let it.
void run_block(int threads, const std::vector<int>& warp_order, const std::vector<int>& lane_order) {
  poison_shared();
  block_barrier = {};
  block_barrier.expected = threads;
  for (int i = 0; i < static_cast<int>(warps.size()); ++i) {
    warps[i].barrier = {};
    warps[i].barrier.expected = std::min(kWarp, threads - kWarp * i);
  }
  const int width = block_threads.x, height = block_threads.y;
  for (int i = 0; i < threads; ++i) {
    fibers[i].index = {i % width, i / width % height, i / width / height};
    fibers[i].number = i;
    fibers[i].is_done = false;
    fibers[i].exchanges = 0;
  }
  int done = 0;
  while (done < threads) {
    bool has_moved = false;
    for (int warp : warp_order) {
      has_moved |= run_ahead(warp, lane_order, &done);
      if (!failure.empty()) return;
    }
    if (has_moved) continue;
    const auto waits = [](const Fiber& fiber) { return !fiber.is_done && fiber.awaited != nullptr; };
    const Fiber& stuck = *std::find_if(fibers.begin(), fibers.end(), waits);
    fail("thread " + std::to_string(stuck.number) + " waits in " + stuck.awaited->what + " for others that " +
         (done > 0 ? "have ended or " : "") + "wait elsewhere");
    return;
  }
}

std::string limits_broken() {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return "a grid without blocks";
  if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) return "a grid beyond CUDA's limits";
  const uint64_t threads = uint64_t{block_threads.x} * block_threads.y * block_threads.z;
  if (threads == 0 || threads > kMostThreads || block_threads.z > 64) {
    return "a block of " + std::to_string(block_threads.x) + " x " + std::to_string(block_threads.y) + " x " +
           std::to_string(block_threads.z) + " threads";
  }
  return "";
}

}  // namespace

void run_grid(dim3 grid_dim, dim3 block_dim, const std::function<void()>& kernel) {
  grid = grid_dim;
  block_threads = block_dim;
  fail(limits_broken());
  if (!failure.empty()) return;
  body = &kernel;
  const int threads = block_dim.x * block_dim.y * block_dim.z;
  fibers.resize(std::max<size_t>(fibers.size(), threads));
  warps.resize((threads + kWarp - 1) / kWarp);
  const std::vector<int> warp_order = turns(warps.size()), lane_order = turns(kWarp);
  for (block.z = 0; block.z < grid.z; ++block.z) {
    for (block.y = 0; block.y < grid.y; ++block.y) {
      for (block.x = 0; block.x < grid.x; ++block.x) {
        run_block(threads, warp_order, lane_order);
        if (failure.empty()) continue;
        for (Fiber& fiber : fibers) {  // wherever they are, they begin anew
          fiber.has_started = false;
          fiber.awaited = nullptr;
        }
        return;
      }
    }
  }
}

void launch(const void* function, dim3 grid_dim, dim3 block_dim, void* stream, const std::function<void()>& kernel) {
  launched.insert(function);
  if (stand_in_launch == nullptr) {
    run_grid(grid_dim, block_dim, kernel);
  } else {
    stand_in_launch(stream, [=] { run_grid(grid_dim, block_dim, kernel); });
  }
}

bool has_failed() { return !failure.empty(); }
bool is_running() { return current != nullptr; }
void abandon(const char* message) {
  fail(message);
  _longjmp(scheduler, 1);
}

const Thread& thread_index() { return current->index; }
const dim3& block_index() { return block; }
const dim3& block_size() { return block_threads; }
const dim3& grid_size() { return grid; }
int lane() { return current->number % kWarp; }

void wait_for_block() { wait_at(block_barrier, "__syncthreads"); }

const char* exchange(const char* what, const void* own, size_t bytes) {
  Warp& warp = warps[current->number / kWarp];
  auto& slots = warp.slots[current->exchanges++ % 2];
  memcpy(slots[lane()], own, bytes);
  wait_at(warp.barrier, what);
  return slots[0];
}

void set_shared(const std::vector<Shared>& objects) { shared_objects = objects; }

void register_shared(void* storage, size_t bytes) {
  if (bytes > kSharedLimit) fail(std::to_string(bytes) + " bytes of shared memory");
  memset(storage, kGarbage, bytes);
  shared_objects.push_back({storage, bytes});
}

namespace {

// Both forms of mma: eight registers make up k. add(c, of a, of b) adds the products of one.
template <typename Sum, typename Word, typename Add>
void multiply_registers(const char* what, Sum (&c)[4], const Word (&a)[4], const Word (&b)[2], const Add& add) {
  const Word own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const char* all = exchange(what, own, sizeof own);
  const int own_lane = lane();
  for (int i = 0; i < 4; ++i) {
    const int row = own_lane / 4 + 8 * (i / 2), column = own_lane % 4 * 2 + i % 2;
    for (int part = 0; part < 8; ++part) {  // the lane and register that hold part `part` of k
      Word of_a[6], of_b[6];
      memcpy(of_a, all + kExchangeBytes * (row % 8 * 4 + part % 4), sizeof of_a);
      memcpy(of_b, all + kExchangeBytes * (column * 4 + part % 4), sizeof of_b);
      c[i] = add(c[i], of_a[row / 8 + 2 * (part / 4)], of_b[4 + part / 4]);
    }
  }
}

// The PTX ISA leaves the rounding of sums open: the worst.
float towards_zero(double value) {
  const float rounded = static_cast<float>(value);
  return fabs(rounded) > fabs(value) ? nextafterf(rounded, 0.0f) : rounded;
}

}  // namespace

void multiply_tiles(int (&c)[4], const int (&a)[4], const int (&b)[2]) {
  multiply_registers("mma", c, a, b, [](int sum, int of_a, int of_b) { return emulated_dot(of_a, of_b, sum); });
}

void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_registers("mma", c, a, b, [](float sum, uint32_t of_a, uint32_t of_b) {
    for (int i = 0; i < 2; ++i) {
      const double product =
          double{to_float(static_cast<uint16_t>(of_a >> 16 * i))} * to_float(static_cast<uint16_t>(of_b >> 16 * i));
      sum = towards_zero(sum + product);
    }
    return sum;
  });
}

}  // namespace emulated

// For the tests: the failure since the last time it was asked for, "" for none.
extern "C" const char* emulated_take_failure() {
  static std::string taken;
  taken = std::exchange(emulated::failure, std::string());
  return taken.c_str();
}

// Of the kernels that were launched since the last time, the addresses in this library as the linker has them:
// hexadecimal numbers with spaces between.
extern "C" const char* emulated_take_launched() {
  static std::string text;
  Dl_info library = {};
  dladdr(reinterpret_cast<const void*>(&emulated_take_launched), &library);
  std::ostringstream numbers;
  for (const void* function : std::exchange(emulated::launched, {})) {
    numbers << std::hex << static_cast<const char*>(function) - static_cast<const char*>(library.dli_fbase) << ' ';
  }
  text = numbers.str();
  return text.c_str();
}

// The order in which the threads of a block take turns: 0 ascending, 1 descending, beyond that shuffled.
extern "C" void emulated_set_order(int seed) { emulated::order_seed = seed; }
