#include "simt.h"

#include <ucontext.h>

#include <algorithm>
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
constexpr int kMostResident = 4;         // blocks side by side
constexpr int kMostPauses = 1 << 20;     // while no atomic operation is done

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

// A store that other blocks do not see yet.
struct Held {
  void* to;
  std::vector<unsigned char> bytes;
};

struct Block {
  int index = 0;
  std::vector<Fiber> fibers;
  uint32_t runnable[kMostThreads / 32];  // a bit a lane
  Meeting meeting[kMostThreads / 32];
  int threads = 0, warps = 0, current = 0, finished = 0;
  int at_barrier = 0, barrier_line = 0;
  std::string barrier_file;
  // Exactly as large as asked for, so that the sanitizer sees an access behind it.
  std::unique_ptr<void, void (*)(void*)> memory{nullptr, std::free};
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<Held> held;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;

  void* scheduler[5];
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};

Block pool[kMostResident];
Block* now = &pool[0];  // the block that runs
int pauses = 0;

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
  int resident = 1;    // blocks side by side
  int turns_left = 0;  // of the block that runs

  void reset(uint64_t seed) {
    random.seed(seed * 0x9e3779b97f4a7c15ull + 1);
    in_order = seed == 0;
    constexpr uint32_t kStay[] = {0, 128, 240, 255};
    stay_of_256 = kStay[seed % 4];
    switch_of_256 = in_order ? 0 : 8;
    picks_left = turns_left = 0;
    resident = in_order ? 1 : 1 + static_cast<int>(below(kMostResident));
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
  const int warp = now->current / 32;
  if (!schedule.in_order && --schedule.picks_left <= 0) {
    schedule.picks_left = 64 << schedule.below(11);
    schedule.lagging = static_cast<uint32_t>(schedule.random());
  }
  if (now->runnable[warp] && (schedule.in_order || schedule.below(256) < schedule.stay_of_256) &&
      (schedule.in_order || !(schedule.lagging >> (warp % 32) & 1))) {
    return warp * 32 + random_bit(now->runnable[warp]);
  }
  uint32_t ahead = 0, behind = 0;
  for (int w = 0; w < now->warps; ++w) {
    if (!now->runnable[w]) continue;
    (schedule.lagging >> w & 1 ? behind : ahead) |= 1u << w;
  }
  const uint32_t warps = ahead ? ahead : behind;
  if (!warps) return -1;
  const int next = random_bit(warps);
  return next * 32 + random_bit(now->runnable[next]);
}

void set_runnable(int thread, bool on) {
  const uint32_t bit = 1u << (thread % 32);
  if (on) {
    now->runnable[thread / 32] |= bit;
  } else {
    now->runnable[thread / 32] &= ~bit;
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
  start_switch(for_good ? nullptr : &self.fake_stack, now->scheduler_stack,
               now->scheduler_stack_bytes);
  if (__builtin_setjmp(self.resume) == 0) jump(now->scheduler);
  finish_switch(now->fibers[now->current].fake_stack, nullptr, nullptr);
}

__attribute__((noinline, no_sanitize_address)) void enter(Fiber& fiber) {
  start_switch(&now->scheduler_fake_stack, fiber.stack.get(), kStackBytes);
  if (__builtin_setjmp(now->scheduler) == 0) {
    if (fiber.started) jump(fiber.resume);
    fiber.started = true;
    setcontext(&fiber.start);
  }
  finish_switch(now->scheduler_fake_stack, nullptr, nullptr);
}

void fiber_main() {
  finish_switch(nullptr, &now->scheduler_stack, &now->scheduler_stack_bytes);
  try {
    (*now->body)();
    for (const auto& group : now->fibers[now->current].groups) {
      if (!group.empty()) throw Error("a thread ended with cp.async copies in flight");
    }
  } catch (...) {
    if (!now->error) now->error = std::current_exception();
  }
  Fiber& self = now->fibers[now->current];
  self.done = true;
  ++now->finished;
  set_runnable(now->current, false);
  leave(self, true);
  std::abort();
}

void switch_away() { leave(now->fibers[now->current], false); }

void block_and_wait() {
  set_runnable(now->current, false);
  switch_away();
}

void set_indices(int thread) {
  now->current = thread;
  thread_index = {thread, 0, 0};
  block_index = {now->index, 0, 0};
}

void release(std::vector<Held>& held) {
  for (const Held& store : held) std::memcpy(store.to, store.bytes.data(), store.bytes.size());
  held.clear();
}

void start_block(int index) {
  now->index = index;
  std::memset(now->shared, kPoison, now->shared_bytes);
  now->finished = now->at_barrier = 0;
  now->error = nullptr;
  for (int t = 0; t < now->threads; ++t) {
    Fiber& fiber = now->fibers[t];
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
  for (int w = 0; w < now->warps; ++w) now->meeting[w].arrived = 0;
}

// Runs one thread of the block `now` until it switches away.
void run_some_thread() {
  const int next = pick();
  if (next < 0) {
    std::string where = now->at_barrier ? " the barrier at " + now->barrier_file + ":" +
                                              std::to_string(now->barrier_line)
                                        : " a warp-wide operation";
    throw Error("divergent barrier: threads wait at" + where + " that others never reach");
  }
  set_indices(next);
  enter(now->fibers[next]);
  if (now->error) std::rethrow_exception(now->error);
}

void run_blocks(const std::vector<int>& order) {
  std::vector<Block*> idle, running;
  for (int i = 0; i < schedule.resident; ++i) idle.push_back(&pool[i]);
  std::vector<Held> late;  // never fenced: there when the launch has ended
  size_t started = 0;
  pauses = 0;
  while (true) {
    while (!idle.empty() && started < order.size()) {
      now = idle.back();
      idle.pop_back();
      running.push_back(now);
      start_block(order[started++]);
      schedule.turns_left = 0;
    }
    if (running.empty()) break;
    if (--schedule.turns_left <= 0) {
      now = running[running.size() == 1 ? 0 : schedule.below(running.size())];
      schedule.turns_left = 1 << (schedule.in_order ? 20 : schedule.below(12));
    }
    run_some_thread();
    if (now->finished == now->threads) {
      late.insert(late.end(), now->held.begin(), now->held.end());
      now->held.clear();
      running.erase(std::find(running.begin(), running.end(), now));
      idle.push_back(now);
      schedule.turns_left = 0;
    }
  }
  release(late);
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

  for (int i = 0; i < schedule.resident; ++i) {
    Block& block = pool[i];
    if (static_cast<int>(block.fibers.size()) < threads) block.fibers.resize(threads);
    for (int t = 0; t < threads; ++t) {
      // Not initialised: pages that no fiber reaches are never touched.
      if (!block.fibers[t].stack) block.fibers[t].stack.reset(new unsigned char[kStackBytes]);
    }
    block.threads = threads;
    block.warps = threads / 32;
    block.body = &body;
    block.shared_bytes = shared_bytes;
    block.held.clear();
    block.memory.reset(std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128));
    block.shared = static_cast<unsigned char*>(block.memory.get());
  }

  block_size = {threads, 1, 1};
  grid_size = {blocks, 1, 1};
  std::vector<int> order(blocks);
  for (int b = 0; b < blocks; ++b) order[b] = b;
  if (!schedule.in_order) {
    for (int b = blocks - 1; b > 0; --b) std::swap(order[b], order[schedule.below(b + 1)]);
  }
  run_blocks(order);
}

unsigned char* shared_memory() { return now->shared; }

void block_barrier(const char* file, int line) {
  if (now->at_barrier == 0) {
    now->barrier_file = file;
    now->barrier_line = line;
  } else if (now->barrier_line != line || now->barrier_file != file) {
    throw Error("divergent barrier: threads meet at lines " + std::to_string(now->barrier_line) +
                " and " + std::to_string(line));
  }
  if (++now->at_barrier < now->threads) return block_and_wait();
  now->at_barrier = 0;
  for (int t = 0; t < now->threads; ++t) set_runnable(t, true);
  if (!schedule.in_order) switch_away();
}

void warp_collective(const char* operation, void* lane_arguments,
                     void (*execute)(void* const* lanes)) {
  const int warp = now->current / 32;
  Meeting& meeting = now->meeting[warp];
  if (meeting.arrived == 0) {
    meeting.operation = operation;
  } else if (meeting.operation != operation && std::strcmp(meeting.operation, operation) != 0) {
    throw Error(std::string("divergent warp: lanes meet at ") + meeting.operation + " and " +
                operation);
  }
  meeting.lanes[now->current % 32] = lane_arguments;
  if (++meeting.arrived < 32) return block_and_wait();
  meeting.arrived = 0;
  execute(meeting.lanes);
  now->runnable[warp] = ~0u;
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
  if (at < now->shared || at + bytes > now->shared + now->shared_bytes) {
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

void publish(void* p, const void* value, size_t bytes) {
  global_access(p, bytes, bytes, true);
  const auto* from = static_cast<const unsigned char*>(value);
  now->held.push_back({p, {from, from + bytes}});
  std::memset(p, kPoison, bytes);
}

void fence() {
  maybe_switch();
  release(now->held);
}

void atomic_access(const void* p) {
  pauses = 0;
  maybe_switch();
  global_access(p, 4, 4, true);
}

void pause() {
  if (++pauses > kMostPauses) throw Error("a block waits for what never comes");
  schedule.turns_left = 0;
  switch_away();
}

void copy_async(void* shared, const void* global, int bytes, int valid_bytes) {
  shared_access(shared, bytes, bytes);
  if (reinterpret_cast<uintptr_t>(global) % bytes) throw Error("misaligned cp.async source");
  if (valid_bytes < 0 || valid_bytes > bytes) throw Error("cp.async of a wrong source size");
  if (valid_bytes > 0) global_access(global, valid_bytes, 1, false);
  std::memset(shared, kPoison, bytes);
  now->fibers[now->current].groups.back().push_back({shared, global, bytes, valid_bytes});
}

void copy_commit() { now->fibers[now->current].groups.emplace_back(); }

void copy_wait(int pending_groups) {
  auto& groups = now->fibers[now->current].groups;
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
