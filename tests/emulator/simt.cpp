#include "simt.h"

#include <ucontext.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <random>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SIMT_SANITIZED 1
#else
#define SIMT_SANITIZED 0
#endif

namespace simt {

Index thread_index, block_index, block_size, grid_size;
Machine machine;

namespace {

constexpr int kMostThreads = 1024;
constexpr size_t kStackBytes = SIMT_SANITIZED ? 1 << 20 : 1 << 18;
constexpr unsigned char kPoison = 0xff;  // a NaN in every format

struct Copy {
  void* shared;
  const void* global;
  int bytes, valid_bytes;
};

// A fiber starts on a ucontext; later switches use the compiler's own setjmp and longjmp, which
// save three registers and make no system call.
struct Fiber {
  ucontext_t start;
  void* resume[5];
  std::unique_ptr<unsigned char[]> stack;
  void* fake_stack = nullptr;
  bool started = false, done = false;
  std::vector<std::vector<Copy>> groups;  // the last one is not committed yet
};

struct Meeting {
  const char* operation = nullptr;
  void* lanes[32];
  int arrived = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  uint32_t runnable[kMostThreads / 32];  // a bit a lane
  Meeting meeting[kMostThreads / 32];
  int threads = 0, warps = 0, current = 0, finished = 0;
  int at_barrier = 0, barrier_line = 0;
  std::string barrier_file;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;

  void* scheduler[5];
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};

Block block;

// A schedule is drawn from the seed: how long a warp keeps running, and which warps lag behind all
// others for a while. A warp that runs as far ahead as the barriers let it, and one that is left
// as far behind, are what finds a missing barrier.
struct Schedule {
  std::mt19937_64 random;
  bool in_order = true;
  uint32_t stay_of_256 = 0;
  uint32_t switch_of_256 = 0;
  uint32_t lagging = 0;  // a bit a warp
  int picks_left = 0;

  void reset(uint64_t seed) {
    random.seed(seed * 0x9e3779b97f4a7c15ull + 1);
    in_order = seed == 0;
    constexpr uint32_t kStay[] = {0, 128, 240, 255};
    stay_of_256 = kStay[seed % 4];
    switch_of_256 = in_order ? 0 : 8;
    picks_left = 0;
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>(random() % n); }
};

Schedule schedule;

int random_bit(uint32_t mask) {
  int skip = schedule.in_order ? 0 : static_cast<int>(schedule.below(__builtin_popcount(mask)));
  for (; skip > 0; --skip) mask &= mask - 1;
  return __builtin_ctz(mask);
}

// The next thread to run, or -1.
int pick() {
  const int warp = block.current / 32;
  if (!schedule.in_order && --schedule.picks_left <= 0) {
    schedule.picks_left = 64 << schedule.below(8);
    schedule.lagging = static_cast<uint32_t>(schedule.random());
  }
  if (block.runnable[warp] && (schedule.in_order || schedule.below(256) < schedule.stay_of_256) &&
      (schedule.in_order || !(schedule.lagging >> (warp % 32) & 1))) {
    return warp * 32 + random_bit(block.runnable[warp]);
  }
  uint32_t ahead = 0, behind = 0;
  for (int w = 0; w < block.warps; ++w) {
    if (!block.runnable[w]) continue;
    (schedule.lagging >> w & 1 ? behind : ahead) |= 1u << w;
  }
  const uint32_t warps = ahead ? ahead : behind;
  if (!warps) return -1;
  const int next = random_bit(warps);
  return next * 32 + random_bit(block.runnable[next]);
}

void set_runnable(int thread, bool on) {
  const uint32_t bit = 1u << (thread % 32);
  if (on) {
    block.runnable[thread / 32] |= bit;
  } else {
    block.runnable[thread / 32] &= ~bit;
  }
}

void start_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* stack,
                  [[maybe_unused]] size_t bytes) {
#if SIMT_SANITIZED
  __sanitizer_start_switch_fiber(save, stack, bytes);
#endif
}
void finish_switch([[maybe_unused]] void* save, [[maybe_unused]] const void** stack,
                   [[maybe_unused]] size_t* bytes) {
#if SIMT_SANITIZED
  __sanitizer_finish_switch_fiber(save, stack, bytes);
#endif
}

[[noreturn]] __attribute__((noinline)) void jump(void** to) { __builtin_longjmp(to, 1); }

// From a fiber to the scheduler; returns when the fiber is picked again.
__attribute__((noinline, no_sanitize_address)) void leave(Fiber& self, bool for_good) {
  start_switch(for_good ? nullptr : &self.fake_stack, block.scheduler_stack,
               block.scheduler_stack_bytes);
  if (__builtin_setjmp(self.resume) == 0) jump(block.scheduler);
  finish_switch(block.fibers[block.current].fake_stack, nullptr, nullptr);
}

__attribute__((noinline, no_sanitize_address)) void enter(Fiber& fiber) {
  start_switch(&block.scheduler_fake_stack, fiber.stack.get(), kStackBytes);
  if (__builtin_setjmp(block.scheduler) == 0) {
    if (fiber.started) jump(fiber.resume);
    fiber.started = true;
    setcontext(&fiber.start);
  }
  finish_switch(block.scheduler_fake_stack, nullptr, nullptr);
}

void fiber_main() {
  finish_switch(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
  try {
    (*block.body)();
    for (const auto& group : block.fibers[block.current].groups) {
      if (!group.empty()) throw Error("a thread ended with cp.async copies in flight");
    }
  } catch (...) {
    if (!block.error) block.error = std::current_exception();
  }
  Fiber& self = block.fibers[block.current];
  self.done = true;
  ++block.finished;
  set_runnable(block.current, false);
  leave(self, true);
  std::abort();
}

void switch_away() { leave(block.fibers[block.current], false); }

void block_and_wait() {
  set_runnable(block.current, false);
  switch_away();
}

void set_indices(int thread) {
  block.current = thread;
  thread_index = {thread, 0, 0};
}

void run_block() {
  std::memset(block.shared, kPoison, block.shared_bytes);
  block.finished = block.at_barrier = 0;
  block.error = nullptr;
  for (int t = 0; t < block.threads; ++t) {
    Fiber& fiber = block.fibers[t];
    fiber.started = fiber.done = false;
    fiber.fake_stack = nullptr;
    fiber.groups.assign(1, {});
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
    set_runnable(t, true);
  }
  for (int w = 0; w < block.warps; ++w) block.meeting[w].arrived = 0;

  while (block.finished < block.threads) {
    const int next = pick();
    if (next < 0) {
      std::string where = block.at_barrier ? " the barrier at " + block.barrier_file + ":" +
                                                 std::to_string(block.barrier_line)
                                           : " a warp-wide operation";
      throw Error("divergent barrier: threads wait at" + where + " that others never reach");
    }
    set_indices(next);
    enter(block.fibers[next]);
    if (block.error) std::rethrow_exception(block.error);
  }
}

}  // namespace

void launch(const char* name, int blocks, int threads, int shared_bytes,
            const std::function<void()>& body) {
  const std::string who = std::string("launch of ") + name + ": ";
  if (blocks < 1) throw Error(who + "a grid of " + std::to_string(blocks) + " blocks");
  if (threads < 1 || threads > kMostThreads || threads % 32 != 0) {
    throw Error(who + "a block of " + std::to_string(threads) + " threads");
  }
  if (shared_bytes > machine.shared_limit) {
    throw Error(who + std::to_string(shared_bytes) + " bytes of shared memory, the machine has " +
                std::to_string(machine.shared_limit));
  }
  machine.launches.push_back(name);
  schedule.reset(machine.seed);

  if (static_cast<int>(block.fibers.size()) < threads) block.fibers.resize(threads);
  for (int t = 0; t < threads; ++t) {
    // Not initialised: pages that no fiber reaches are never touched.
    if (!block.fibers[t].stack) block.fibers[t].stack.reset(new unsigned char[kStackBytes]);
  }
  block.threads = threads;
  block.warps = threads / 32;
  block.body = &body;
  block.shared_bytes = shared_bytes;
  // Exactly as large as asked for, so that the sanitizer sees an access behind it.
  const std::unique_ptr<void, void (*)(void*)> shared(
      std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128), std::free);
  block.shared = static_cast<unsigned char*>(shared.get());

  block_size = {threads, 1, 1};
  grid_size = {blocks, 1, 1};
  std::vector<int> order(blocks);
  for (int b = 0; b < blocks; ++b) order[b] = b;
  if (!schedule.in_order) {
    for (int b = blocks - 1; b > 0; --b) std::swap(order[b], order[schedule.below(b + 1)]);
  }
  for (const int b : order) {
    block_index = {b, 0, 0};
    run_block();
  }
}

unsigned char* shared_memory() { return block.shared; }

void block_barrier(const char* file, int line) {
  if (block.at_barrier == 0) {
    block.barrier_file = file;
    block.barrier_line = line;
  } else if (block.barrier_line != line || block.barrier_file != file) {
    throw Error("divergent barrier: threads meet at lines " + std::to_string(block.barrier_line) +
                " and " + std::to_string(line));
  }
  if (++block.at_barrier < block.threads) return block_and_wait();
  block.at_barrier = 0;
  for (int t = 0; t < block.threads; ++t) set_runnable(t, true);
  if (!schedule.in_order) switch_away();
}

void warp_collective(const char* operation, void* lane_arguments,
                     void (*execute)(void* const* lanes)) {
  const int warp = block.current / 32;
  Meeting& meeting = block.meeting[warp];
  if (meeting.arrived == 0) {
    meeting.operation = operation;
  } else if (meeting.operation != operation && std::strcmp(meeting.operation, operation) != 0) {
    throw Error(std::string("divergent warp: lanes meet at ") + meeting.operation + " and " +
                operation);
  }
  meeting.lanes[block.current % 32] = lane_arguments;
  if (++meeting.arrived < 32) return block_and_wait();
  meeting.arrived = 0;
  execute(meeting.lanes);
  block.runnable[warp] = ~0u;
}

void warp_barrier(const char*, int line) {
  static std::map<int, std::string> names;  // the line tells one barrier from another
  std::string& name = names[line];
  if (name.empty()) name = "__syncwarp at line " + std::to_string(line);
  warp_collective(name.c_str(), nullptr, [](void* const*) {});
}

void maybe_switch() {
  if (schedule.switch_of_256 && schedule.below(256) < schedule.switch_of_256) switch_away();
}

void shared_access(const void* p, size_t bytes, size_t alignment) {
  const auto* at = static_cast<const unsigned char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % alignment) throw Error("misaligned shared access");
  if (at < block.shared || at + bytes > block.shared + block.shared_bytes) {
    throw Error("access outside shared memory");
  }
  maybe_switch();
}

void global_access(const void* p, size_t bytes, size_t alignment, bool write) {
  if (reinterpret_cast<uintptr_t>(p) % alignment) throw Error("misaligned global access");
  const auto* at = static_cast<const unsigned char*>(p);
  for (Buffer& buffer : machine.buffers) {
    if (at >= buffer.data && at + bytes <= buffer.data + buffer.bytes) {
      (write ? buffer.bytes_written : buffer.bytes_read) += static_cast<int64_t>(bytes);
      return;
    }
  }
  if (!SIMT_SANITIZED) throw Error("global access outside every buffer");
}

void copy_async(void* shared, const void* global, int bytes, int valid_bytes) {
  shared_access(shared, bytes, bytes);
  if (reinterpret_cast<uintptr_t>(global) % bytes) throw Error("misaligned cp.async source");
  if (valid_bytes < 0 || valid_bytes > bytes) throw Error("cp.async of a wrong source size");
  if (valid_bytes > 0) global_access(global, valid_bytes, 1, false);
  std::memset(shared, kPoison, bytes);
  block.fibers[block.current].groups.back().push_back({shared, global, bytes, valid_bytes});
}

void copy_commit() { block.fibers[block.current].groups.emplace_back(); }

void copy_wait(int pending_groups) {
  auto& groups = block.fibers[block.current].groups;
  const int landing = static_cast<int>(groups.size()) - 1 - pending_groups;
  for (int g = 0; g < landing; ++g) {
    for (const Copy& copy : groups[g]) {
      std::memset(copy.shared, 0, copy.bytes);
      std::memcpy(copy.shared, copy.global, copy.valid_bytes);
    }
  }
  if (landing > 0) groups.erase(groups.begin(), groups.begin() + landing);
  maybe_switch();
}

}  // namespace simt
