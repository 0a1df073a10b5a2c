// A SIMT machine on one CPU thread: every CUDA thread is a fiber, and every point where threads
// could meet or where one could observe another is a point where the scheduler may switch. Blocks
// start in any order, and a few of them run side by side.
//
// What it detects, by throwing simt::Error: barriers and warp-wide operations that not all threads
// reach or that they reach at different lines; a block, grid or shared memory the machine does not
// have; a block that waits for what no other will do; misaligned accesses; global accesses outside
// the registered buffers (the sanitized build leaves those to the sanitizer); copies still in
// flight at a thread's end. What it makes visible in the results: shared memory read before it is
// written (NaN), cp.async data read before its wait or overwritten while others still read it
// (NaN), what a block publishes to others read before its fence (NaN), and missing barriers (random
// order).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Index {
  int x = 0, y = 0, z = 0;
};
extern Index thread_index, block_index, block_size, grid_size;

// Global memory that kernels may touch, with the bytes they read and wrote.
struct Buffer {
  unsigned char* data;
  size_t bytes;
  int64_t bytes_read = 0;
  int64_t bytes_written = 0;
};

struct Machine {
  uint64_t seed = 0;     // 0 runs threads in order; any other seed draws its own scheduler
  int shared_limit = 0;  // bytes a block
  std::vector<Buffer> buffers;
  std::vector<std::string> launches;
};
extern Machine machine;

void launch(const char* name, int blocks, int threads, int shared_bytes,
            const std::function<void()>& body);

// From inside a kernel.
unsigned char* shared_memory();
void block_barrier(const char* file, int line);
void warp_barrier(const char* file, int line);
// A point where another thread may run; taken at random.
void maybe_switch();
// Blocks until all lanes of the warp call it with the same `operation`; the last one runs
// `execute` on the arguments of all lanes.
void warp_collective(const char* operation, void* lane_arguments,
                     void (*execute)(void* const* lanes));
void copy_async(void* shared, const void* global, int bytes, int valid_bytes);
void copy_commit();
void copy_wait(int pending_groups);

// A store that other blocks see, as NaN until this block's next fence, then as it is.
void publish(void* p, const void* value, size_t bytes);
void fence();
void atomic_access(const void* p);
// Between two looks at what another block is to write.
void pause();

void global_access(const void* p, size_t bytes, size_t alignment, bool write);
void shared_access(const void* p, size_t bytes, size_t alignment);

}  // namespace simt
