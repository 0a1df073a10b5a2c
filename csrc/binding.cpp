// The Python module osf_kernels._cuda: integer addresses, packed records and a stream handle in,
// launches out. Importing it makes no CUDA call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "api.h"

namespace py = pybind11;

namespace osf {
namespace {

// Blocks ask for up to 160 KB of shared memory and a word; sm_86 and sm_89 have 99 KB.
constexpr int kSharedBytes = 163 * 1024;

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next who asks would take it for its own
  const std::string text =
      std::string("osf_kernels: ") + call + " failed: " + cudaGetErrorString(error);
  if (error == cudaErrorMemoryAllocation) {
    PyErr_SetString(PyExc_MemoryError, text.c_str());
    throw py::error_already_set();
  }
  throw std::runtime_error(text);
}

// Makes `device` current and restores the caller's device.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = before_ != device;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

int attribute(int device, cudaDeviceAttr which, const char* name) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device),
        (std::string("cudaDeviceGetAttribute(") + name + ")").c_str());
  return value;
}

int shared_bytes(int device) {
  return attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin, "MaxSharedMemoryPerBlockOptin");
}

Machine machine_of(int device) {
  static std::mutex mutex;
  static std::vector<Machine> machines;  // no multiprocessors where not asked yet
  const std::lock_guard<std::mutex> lock(mutex);
  if (device < 0) throw std::invalid_argument("osf_kernels: a negative device index");
  if (static_cast<int>(machines.size()) <= device) machines.resize(device + 1, Machine{});
  Machine& machine = machines[device];
  if (machine.multiprocessors == 0) {
    machine.shared_bytes = shared_bytes(device);
    machine.multiprocessors =
        attribute(device, cudaDevAttrMultiProcessorCount, "MultiProcessorCount");
  }
  return machine;
}

std::string architectures() {
  std::string text;
  for (const int* arch = compiled_architectures(); *arch != 0; ++arch) {
    if (!text.empty()) text += ' ';
    text += std::to_string(*arch / 100) + '.' + std::to_string(*arch % 100 / 10);
  }
  return text;
}

// Why the kernels cannot run on a device, or nothing.
std::optional<std::string> unsupported(int device) {
  const int shared = shared_bytes(device);
  if (shared < kSharedBytes) {
    return "its blocks have " + std::to_string(shared) +
           " bytes of shared memory, the kernels need " + std::to_string(kSharedBytes);
  }
  const DeviceGuard guard(device);
  const cudaError_t error = image_error();
  if (error == cudaSuccess) return std::nullopt;
  return "the CUDA extension was built for compute capability " + architectures() +
         " (TORCH_CUDA_ARCH_LIST), of which it runs none: " + cudaGetErrorString(error);
}

template <class Job>
std::vector<Job> jobs_of(const py::bytes& records) {
  const std::string_view view = records;
  if (view.size() % sizeof(Job) != 0) {
    throw std::invalid_argument("osf_kernels: expected records of " + std::to_string(sizeof(Job)) +
                                " bytes, got " + std::to_string(view.size()) + " bytes");
  }
  std::vector<Job> jobs(view.size() / sizeof(Job));
  std::memcpy(static_cast<void*>(jobs.data()), view.data(), view.size());
  return jobs;
}

int64_t counter_bytes() { return coefficients_counters() * static_cast<int64_t>(sizeof(int32_t)); }

// A number that no other stream of the process ever has, whereas a handle is used again after its
// stream's end and one handle is another stream in every thread.
uint64_t number_of(cudaStream_t stream) {
#if CUDART_VERSION >= 12000
  unsigned long long number = 0;
  check(cudaStreamGetId(stream, &number), "cudaStreamGetId");
  return number;
#else
  return reinterpret_cast<uintptr_t>(stream);
#endif
}

// Zeros, which every launch on a stream finds and leaves as zeros: launches follow each other
// there, so they share one array, made with the first and kept, half a kilobyte a stream. Of CUDA's
// own allocator: torch's lends from the pool of a graph while a call is warmed up for it, and that
// takes its memory back. A kernel that is aborted takes the context with it, and so the array.
int32_t* counters_of(int device, cudaStream_t stream) {
  static std::mutex mutex;
  static std::map<std::pair<int, uint64_t>, int32_t*> found;
  const std::lock_guard<std::mutex> lock(mutex);
  int32_t*& counters = found[{device, number_of(stream)}];
  if (counters == nullptr) {
    void* made = nullptr;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // another thread may be capturing
    check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
    const cudaError_t error = cudaMalloc(&made, counter_bytes());
    check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
    check(error, "cudaMalloc");
    check(cudaMemsetAsync(made, 0, counter_bytes(), stream), "cudaMemsetAsync");
    counters = static_cast<int32_t*>(made);
  }
  return counters;
}

// The partial sums, and counters behind them for a graph.
int64_t workspace_bytes(const py::bytes& records, int device, bool allow_tf32) {
  const auto jobs = jobs_of<CoefficientsJob>(records);
  return coefficients_workspace_bytes(jobs.data(), static_cast<int64_t>(jobs.size()), allow_tf32,
                                      machine_of(device)) +
         counter_bytes();
}

void run_coefficients(const py::bytes& records, int device, bool allow_tf32, uintptr_t workspace,
                      int64_t bytes, uintptr_t stream_handle) {
  const auto jobs = jobs_of<CoefficientsJob>(records);
  const auto count = static_cast<int64_t>(jobs.size());
  const Machine machine = machine_of(device);
  const int64_t sums = coefficients_workspace_bytes(jobs.data(), count, allow_tf32, machine);
  if (bytes < sums + counter_bytes()) {
    throw std::invalid_argument("osf_kernels: expected a workspace of " +
                                std::to_string(sums + counter_bytes()) + " bytes, got " +
                                std::to_string(bytes));
  }
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  auto status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  int32_t* counters = nullptr;
  if (status == cudaStreamCaptureStatusNone) {
    counters = counters_of(device, stream);
  } else {
    // A graph may run beside the stream it was captured on: counters of its own, zeroed by a node.
    counters = reinterpret_cast<int32_t*>(workspace + sums);
    check(cudaMemsetAsync(counters, 0, counter_bytes(), stream), "cudaMemsetAsync");
  }
  coefficients(jobs.data(), count, allow_tf32, machine, reinterpret_cast<void*>(workspace),
               counters, stream);
}

void run_update(const py::bytes& records, int device, bool allow_tf32, uintptr_t stream) {
  const auto jobs = jobs_of<UpdateJob>(records);
  const DeviceGuard guard(device);
  update(jobs.data(), static_cast<int64_t>(jobs.size()), allow_tf32, machine_of(device),
         reinterpret_cast<cudaStream_t>(stream));
}

template <class Job>
Job job_of(const py::bytes& record) {
  const auto jobs = jobs_of<Job>(record);
  if (jobs.size() != 1) {
    throw std::invalid_argument("osf_kernels: expected one record, got " +
                                std::to_string(jobs.size()));
  }
  return jobs[0];
}

void run_cholesky(const py::bytes& record, int device, uintptr_t stream) {
  const auto job = job_of<CholeskyJob>(record);
  const DeviceGuard guard(device);
  cholesky_inverse(job, machine_of(device), reinterpret_cast<cudaStream_t>(stream));
}

void run_jacobi(const py::bytes& record, int device, uintptr_t stream) {
  const auto job = job_of<JacobiJob>(record);
  const DeviceGuard guard(device);
  jacobi_svd(job, machine_of(device), reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace
}  // namespace osf

PYBIND11_MODULE(_cuda, module) {
  const int compiler = osf::compiler_version();
  module.doc() = "Grouped CUDA kernels of osf_kernels; called by osf_kernels.backends.cuda.";
  module.attr("nvcc_version") =
      std::to_string(compiler / 1000) + '.' + std::to_string(compiler % 1000 / 10);
  module.attr("cuda_archs") = osf::architectures();
  module.def("unsupported", &osf::unsupported, py::arg("device"));
  module.def("coefficients_workspace_bytes", &osf::workspace_bytes, py::arg("records"),
             py::arg("device"), py::arg("allow_tf32"));
  module.def("coefficients", &osf::run_coefficients, py::arg("records"), py::arg("device"),
             py::arg("allow_tf32"), py::arg("workspace"), py::arg("workspace_bytes"),
             py::arg("stream"));
  module.def("update", &osf::run_update, py::arg("records"), py::arg("device"),
             py::arg("allow_tf32"), py::arg("stream"));
  module.def("cholesky_inverse", &osf::run_cholesky, py::arg("record"), py::arg("device"),
             py::arg("stream"));
  module.def("jacobi_svd", &osf::run_jacobi, py::arg("record"), py::arg("device"),
             py::arg("stream"));
  module.def("largest_cholesky",
             [](int device) { return osf::largest_cholesky(osf::machine_of(device)); });
  module.def("largest_jacobi", [](int device, int64_t rows) {
    return osf::largest_jacobi(rows, osf::machine_of(device));
  });
}
