// Runs one list of jobs through the library's host interface, once a seed.
//
//   emulator REQUEST RESULT
//
// REQUEST, in 8-byte integers: kind (0 coefficients, 1 update, 2 inverse Cholesky factors, 3 SVD),
// multiprocessors, allow_tf32, shared memory limit, number of seeds, of buffers and of jobs; the
// seeds; the buffers' sizes; the buffers' bytes one after another; the jobs as in csrc/api.h, where
// a pointer is (1 + buffer) << 40 | offset. RESULT: of coefficients, the workspace that each job takes
// by itself; then, a seed: per buffer the bytes read and written
// by the kernels; the number of launches; the buffers' bytes.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <memory>
#include <vector>

#include "api.h"
#include "simt.h"

namespace {

int64_t read_integer(std::istream& in) {
  int64_t value = 0;
  in.read(reinterpret_cast<char*>(&value), sizeof value);
  return value;
}

void write_integer(std::ostream& out, int64_t value) {
  out.write(reinterpret_cast<const char*>(&value), sizeof value);
}

struct Free {
  void operator()(unsigned char* p) const { std::free(p); }
};
// Exactly as large as asked for, so that the sanitizer sees an access behind it.
using Bytes = std::unique_ptr<unsigned char[], Free>;
Bytes allocate(int64_t bytes) { return Bytes(static_cast<unsigned char*>(std::malloc(bytes))); }

template <class Job>
std::vector<Job> read_jobs(std::istream& in, int64_t count) {
  std::vector<Job> jobs(count);
  in.read(reinterpret_cast<char*>(jobs.data()), count * static_cast<int64_t>(sizeof(Job)));
  return jobs;
}

template <class Pointer>
void resolve(Pointer*& pointer, const std::vector<Bytes>& buffers) {
  const uint64_t code = reinterpret_cast<uintptr_t>(pointer);
  if (code == 0) return;
  unsigned char* base = buffers.at((code >> 40) - 1).get();
  pointer = reinterpret_cast<Pointer*>(base + (code & ((uint64_t{1} << 40) - 1)));
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 3) return 2;
  std::ifstream in(argv[1], std::ios::binary);
  std::ofstream out(argv[2], std::ios::binary);
  const int64_t kind = read_integer(in);
  osf::Machine machine{};
  machine.multiprocessors = static_cast<int>(read_integer(in));
  const bool allow_tf32 = read_integer(in) != 0;
  machine.shared_bytes = simt::machine.shared_limit = static_cast<int>(read_integer(in));
  std::vector<uint64_t> seeds(read_integer(in));
  std::vector<int64_t> sizes(read_integer(in));
  const int64_t job_count = read_integer(in);
  for (auto& seed : seeds) seed = static_cast<uint64_t>(read_integer(in));
  for (auto& size : sizes) size = read_integer(in);
  std::vector<Bytes> originals, buffers;
  for (const int64_t size : sizes) {
    originals.push_back(allocate(size));
    buffers.push_back(allocate(size));
    in.read(reinterpret_cast<char*>(originals.back().get()), size);
  }
  auto coefficients_jobs = read_jobs<osf::CoefficientsJob>(in, kind == 0 ? job_count : 0);
  auto update_jobs = read_jobs<osf::UpdateJob>(in, kind == 1 ? job_count : 0);
  auto cholesky_jobs = read_jobs<osf::CholeskyJob>(in, kind == 2 ? job_count : 0);
  auto jacobi_jobs = read_jobs<osf::JacobiJob>(in, kind == 3 ? job_count : 0);
  if (!in) throw simt::Error("the request is too short");
  for (auto& job : coefficients_jobs) {
    for (auto* a : {&job.x, &job.U, &job.V, &job.A, &job.B}) resolve(a->data, buffers);
    resolve(job.S, buffers);
  }
  for (auto& job : update_jobs) {
    for (auto* a : {&job.out, &job.x, &job.addend, &job.L1, &job.R1, &job.L2, &job.R2}) {
      resolve(a->data, buffers);
    }
  }
  for (auto& job : cholesky_jobs) {
    resolve(job.G, buffers);
    resolve(job.inverse, buffers);
    resolve(job.info, buffers);
  }
  for (auto& job : jacobi_jobs) {
    resolve(job.M, buffers);
    for (auto** a : {&job.Ut, &job.S, &job.Vt}) resolve(*a, buffers);
    resolve(job.info, buffers);
  }

  // One for all seeds: each call has to leave it as it was.
  const int64_t counter_bytes = 4 * osf::coefficients_counters();
  const Bytes counters = allocate(counter_bytes);
  std::memset(counters.get(), 0, counter_bytes);

  for (const auto& job : coefficients_jobs) {
    write_integer(out, osf::coefficients_workspace_bytes(&job, 1, allow_tf32, machine));
  }

  for (const uint64_t seed : seeds) {
    simt::machine.seed = seed;
    simt::machine.launches.clear();
    simt::machine.buffers.clear();
    for (size_t i = 0; i < sizes.size(); ++i) {
      std::memcpy(buffers[i].get(), originals[i].get(), sizes[i]);
      simt::machine.buffers.push_back({buffers[i].get(), static_cast<size_t>(sizes[i])});
    }
    if (kind == 0) {
      const int64_t bytes = osf::coefficients_workspace_bytes(coefficients_jobs.data(), job_count,
                                                              allow_tf32, machine);
      const Bytes workspace = allocate(bytes);
      std::memset(workspace.get(), 0xff, bytes);
      simt::machine.buffers.push_back({workspace.get(), static_cast<size_t>(bytes)});
      simt::machine.buffers.push_back({counters.get(), static_cast<size_t>(counter_bytes)});
      osf::coefficients(coefficients_jobs.data(), job_count, allow_tf32, machine, workspace.get(),
                        reinterpret_cast<int32_t*>(counters.get()), nullptr);
      for (int64_t i = 0; i < counter_bytes; ++i) {
        if (counters[i] != 0) throw simt::Error("the counters are not left at zero");
      }
    } else if (kind == 1) {
      osf::update(update_jobs.data(), job_count, allow_tf32, machine, nullptr);
    }
    for (const auto& job : cholesky_jobs) osf::cholesky_inverse(job, machine, nullptr);
    for (const auto& job : jacobi_jobs) osf::jacobi_svd(job, machine, nullptr);
    for (size_t i = 0; i < sizes.size(); ++i) {
      write_integer(out, simt::machine.buffers[i].bytes_read);
      write_integer(out, simt::machine.buffers[i].bytes_written);
    }
    write_integer(out, static_cast<int64_t>(simt::machine.launches.size()));
    for (size_t i = 0; i < sizes.size(); ++i) {
      out.write(reinterpret_cast<const char*>(buffers[i].get()), sizes[i]);
    }
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "emulator: %s\n", error.what());
  return 3;
}
