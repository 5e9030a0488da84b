// A stand-in for NVIDIA's runtime library: a device that keeps what is copied to it and computes
// nothing. Its memory cannot be read but by copies, so code that takes a device's pointer for the
// host's stops. Kernels, copies and recorded graphs are written down in the file STANDIN_LOG, one a
// line; "recorded " stands before what happens while a graph is recorded.
//
// What is not here is made by build.py and succeeds without doing anything.
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>

namespace {

constexpr size_t kBytes = size_t{16} << 30;
constexpr size_t kAlignment = 512;

std::mutex mutex;
char *device = nullptr;  // what the program sees: pages that cannot be touched
char *memory = nullptr;  // the same pages, for copies
size_t used = 0;
std::unordered_map<char *, size_t> sizes;
std::multimap<size_t, char *> free_blocks;
std::unordered_map<const void *, std::string> kernels;
bool recording = false;

void note(const char *format, ...) {
  static FILE *file = [] {
    const char *path = getenv("STANDIN_LOG");
    FILE *opened = path ? fopen(path, "a") : nullptr;
    if (opened) setvbuf(opened, nullptr, _IOLBF, 1 << 16);
    return opened;
  }();
  if (!file) return;
  va_list arguments;
  va_start(arguments, format);
  if (recording) fputs("recorded ", file);
  vfprintf(file, format, arguments);
  fputc('\n', file);
  va_end(arguments);
}

void *allocate(size_t size) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!device) {
    int file = memfd_create("device", 0);
    if (file < 0 || ftruncate(file, kBytes) != 0) abort();
    auto map = [file](int protection) {
      return mmap(nullptr, kBytes, protection, MAP_SHARED | MAP_NORESERVE, file, 0);
    };
    device = static_cast<char *>(map(PROT_NONE));
    memory = static_cast<char *>(map(PROT_READ | PROT_WRITE));
  }
  size = (size + kAlignment) / kAlignment * kAlignment;
  auto found = free_blocks.lower_bound(size);
  if (found != free_blocks.end() && found->first <= 2 * size) {
    char *block = found->second;
    sizes[block] = found->first;
    free_blocks.erase(found);
    return block;
  }
  if (used + size > kBytes) return nullptr;
  char *block = device + used;
  used += size;
  sizes[block] = size;
  return block;
}

void release(void *pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = sizes.find(static_cast<char *>(pointer));
  if (found == sizes.end()) return;
  free_blocks.emplace(found->second, found->first);
  sizes.erase(found);
}

bool on_device(const void *pointer) {
  return device && pointer >= device && pointer < device + kBytes;
}

char *readable(const void *pointer) {
  char *bytes = static_cast<char *>(const_cast<void *>(pointer));
  return on_device(pointer) ? memory + (bytes - device) : bytes;
}

cudaError_t copy(const char *how, void *target, const void *source, size_t size) {
  const char *from = on_device(source) ? "device" : "host";
  note("%s %s-to-%s %zu", how, from, on_device(target) ? "device" : "host", size);
  if (size) memmove(readable(target), readable(source), size);
  return cudaSuccess;
}

cudaError_t launch(const void *function) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = kernels.find(function);
  note("kernel %s", found == kernels.end() ? "?" : found->second.c_str());
  return cudaSuccess;
}

template <typename Handle>
cudaError_t give(Handle *handle) {  // any pointer will do
  *handle = reinterpret_cast<Handle>(calloc(1, 256));
  return cudaSuccess;
}

int capability() {
  const char *value = getenv("STANDIN_CAPABILITY");
  return value ? atoi(value) : 90;
}

}  // namespace

extern "C" {

// For the stand-ins of the other libraries.
void standin_library_call(const char *name) { note("library %s", name); }

void **__cudaRegisterFatBinary(void *) {
  static void *handle;
  return &handle;
}
void __cudaRegisterFunction(void **, const char *host, char *, const char *name, int, ...) {
  std::lock_guard<std::mutex> lock(mutex);
  kernels[host] = name;
}
struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
static thread_local Configuration configuration;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
  *static_cast<cudaStream_t *>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void *>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void **, size_t, cudaStream_t) {
  return launch(kernel);
}
cudaError_t cudaLaunchKernel(const void *function, dim3, dim3, void **, size_t, cudaStream_t) {
  return launch(function);
}
cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3, dim3, void **, size_t,
                                        cudaStream_t) {
  return launch(function);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *, const void *function, void **) {
  return launch(function);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void *data) {
  note("host function");
  function(data);
  return cudaSuccess;
}
cudaError_t cudaLibraryLoadData(cudaLibrary_t *library, const void *, cudaJitOption *, void **,
                                unsigned, cudaLibraryOption *, void **, unsigned) {
  return give(library);
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t *kernel, cudaLibrary_t, const char *name) {
  give(kernel);
  std::lock_guard<std::mutex> lock(mutex);
  kernels[*kernel] = name;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *number) { return *number = 0, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "stand-in");
  p->major = capability() / 10, p->minor = capability() % 10;
  p->totalGlobalMem = kBytes, p->warpSize = 32, p->multiProcessorCount = 132;
  p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = 227 << 10;
  p->sharedMemPerMultiprocessor = 228 << 10, p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536, p->l2CacheSize = 50 << 20, p->unifiedAddressing = 1;
  p->concurrentKernels = p->cooperativeLaunch = p->memoryPoolsSupported = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = capability() / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability() % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 << 10; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    default: *value = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024, attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = capability();
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *, int,
                                                                   size_t, unsigned) {
  return *count = 2, cudaSuccess;
}
const char *cudaGetErrorName(cudaError_t) { return "stand-in"; }
const char *cudaGetErrorString(cudaError_t) { return "stand-in"; }
static int nothing() { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *, void **entry, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult *result) {
  *entry = reinterpret_cast<void *>(nothing);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void **pointer, size_t size) {
  note("allocation %zu", size);
  *pointer = allocate(size);
  return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void *pointer) { return release(pointer), cudaSuccess; }
cudaError_t cudaMallocFromPoolAsync(void **pointer, size_t size, cudaMemPool_t, cudaStream_t) {
  return cudaMalloc(pointer, size);
}
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t) { return cudaFree(pointer); }
cudaError_t cudaMemPoolCreate(cudaMemPool_t *pool, const cudaMemPoolProps *) { return give(pool); }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void *value) {
  return memset(value, 0, 8), cudaSuccess;
}
cudaError_t cudaMallocHost(void **pointer, size_t size) {
  return *pointer = calloc(1, size + 1), cudaSuccess;
}
cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned) {
  return cudaMallocHost(pointer, size);
}
cudaError_t cudaFreeHost(void *pointer) { return free(pointer), cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  return *available = kBytes - used, *total = kBytes, cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *pointer) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = on_device(pointer) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  attributes->devicePointer = attributes->hostPointer = const_cast<void *>(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void *target, const void *source, size_t size, cudaMemcpyKind) {
  return copy("waiting-copy", target, source, size);
}
cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t size, cudaMemcpyKind,
                            cudaStream_t) {
  return copy("copy", target, source, size);
}
cudaError_t cudaMemcpy2DAsync(void *target, size_t target_pitch, const void *source,
                              size_t source_pitch, size_t width, size_t height, cudaMemcpyKind,
                              cudaStream_t) {
  const char *from = on_device(source) ? "device" : "host";
  note("copy %s-to-%s %zu", from, on_device(target) ? "device" : "host", width * height);
  for (size_t i = 0; i < height; i++)
    memmove(readable(target) + i * target_pitch, readable(source) + i * source_pitch, width);
  return cudaSuccess;
}
cudaError_t cudaMemcpyFromSymbol(void *target, const void *, size_t size, size_t, cudaMemcpyKind) {
  return memset(readable(target), 0, size), cudaSuccess;
}
cudaError_t cudaMemset(void *target, int value, size_t size) {
  note("fill %zu", size);
  return memset(readable(target), value, size), cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *target, int value, size_t size, cudaStream_t) {
  return cudaMemset(target, value, size);
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return give(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) { return give(stream); }
cudaError_t cudaEventCreate(cudaEvent_t *event) { return give(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) { return give(event); }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t, cudaEvent_t) {
  return *milliseconds = 0, cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *status) {
  *status = recording ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  note("recording begins");
  return recording = true, cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph) {
  recording = false;
  note("recording ends");
  return give(graph);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *graph, cudaGraph_t, unsigned long long) {
  return give(graph);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
  note("graph");
  return cudaSuccess;
}

}  // extern "C"
