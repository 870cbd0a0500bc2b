// A CUDA device that is not there.
//
// Preloaded under a CUDA build of torch (standin.py), it answers in the place of the CUDA runtime, cuBLAS, cuDNN and the driver.  Torch's
// dispatcher, allocator, autograd engine and graph capture run as on a GPU; memory is there and copies copy, but kernels do nothing.  What
// is looked at: kernels and copies are counted by name, and every call that a stream capture forbids is noted.  What CUDA says about
// captures is taken from the CUDA C++ programming guide, section "CUDA Graphs".  Functions that need to do nothing are not here:
// standin.py writes them from the names that torch's libraries ask for.
#define __device_builtin__                          // which nvcc's own header would define
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __align__(n) __attribute__((aligned(n)))
#define __host__
#define __device__
#include <driver_types.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {

typedef int Error;                                  // of all libraries; 0 is success
const Error UNSUPPORTED = 900, INVALIDATED = 901, UNJOINED = 904, ISOLATION = 905, IMPLICIT = 906, NO_MEMORY = 2;

std::recursive_mutex mutex;
#define LOCKED std::lock_guard<std::recursive_mutex> locked(mutex)

// -- what is counted and noted
std::map<std::string, long> counts;
std::vector<std::string> violations;
bool counting = false;

void note(const std::string& what) { violations.push_back(what); }
void count(const std::string& what) { if (counting) counts[what]++; }

// -- streams, events and captures
typedef std::map<int, long> Seen;                   // of each stream, how much of its work comes before what follows
struct Stream { int number; int capture; Seen seen; };
struct Event { int capture; bool recorded; Seen seen; };
struct Capture { int number = 0; bool running = false, broken = false; Stream* origin = nullptr; long nodes = 0; } capture;
std::map<void*, Stream> streams;                    // by handle; the legacy stream has several
thread_local int mode = 0;                          // cudaStreamCaptureMode of this thread: 2 is relaxed

bool is_legacy(void* handle) { return (size_t)handle <= 2; }

Stream& stream_of(void* handle) {
    if (is_legacy(handle)) handle = nullptr;
    auto found = streams.find(handle);
    if (found == streams.end()) found = streams.emplace(handle, Stream{(int)streams.size(), 0, {}}).first;
    return found->second;
}

bool is_captured(const Stream& stream) { return capture.running && stream.capture == capture.number; }

Error refuse(const std::string& what, Error error) { note(what); capture.broken = true; return error; }

Error unsafe(const char* what) {                    // what no thread may call while one captures
    LOCKED;
    return capture.running && mode != 2 ? refuse(std::string(what) + " in a capture", UNSUPPORTED) : 0;
}

Error work(const std::string& name, void* handle) { // a kernel, a copy or the like
    LOCKED;
    Stream& stream = stream_of(handle);
    stream.seen[stream.number]++;
    count(name);
    if (is_captured(stream)) capture.nodes++;
    else if (capture.running) note(name + " on a stream that is not captured");
    return 0;
}

// -- memory
std::map<char*, size_t> on_device, pinned;

bool lies_in(std::map<char*, size_t>& blocks, const void* place) {
    auto after = blocks.upper_bound((char*)place);
    if (after == blocks.begin()) return false;
    --after;
    return place < after->first + after->second;
}

const char* where(const void* place) { return lies_in(on_device, place) ? "device" : lies_in(pinned, place) ? "pinned" : "host"; }

Error allocate(std::map<char*, size_t>& blocks, void** made, size_t bytes, const char* what) {
    if (Error error = unsafe(what)) return error;
    LOCKED;
    void* place = mmap(nullptr, bytes ? bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (place == MAP_FAILED) return NO_MEMORY;
    blocks[(char*)place] = bytes ? bytes : 1;
    *made = place;
    return 0;
}

Error release(std::map<char*, size_t>& blocks, void* place, const char* what) {
    if (!place) return 0;
    if (Error error = unsafe(what)) return error;
    LOCKED;
    auto found = blocks.find((char*)place);
    if (found != blocks.end()) { munmap(place, found->second); blocks.erase(found); }
    return 0;
}

Error copy(void* to, const void* from, size_t bytes, void* handle, bool waits) {
    LOCKED;
    std::string name = std::string("copy ") + where(from) + " to " + where(to);
    if (waits) {
        count(name);
        count("wait");
        if (Error error = unsafe(name.c_str())) return error;
    } else {
        work(name, handle);
        if (is_captured(stream_of(handle)) && !(lies_in(on_device, from) && lies_in(on_device, to))) note(name + " in a capture");
    }
    memmove(to, from, bytes);
    return 0;
}

std::map<const void*, std::string> kernels;         // by the host's function
std::map<const void*, size_t> variables;

Error launched(const void* function, void* handle) {
    LOCKED;
    auto found = kernels.find(function);
    return work(found == kernels.end() ? "kernel without a name" : found->second, handle);
}

struct Dimensions { unsigned x, y, z; };
struct Configuration { Dimensions grid, block; size_t shared; void* stream; };
thread_local Configuration pushed;
char something[4096];                               // what handles point to that nobody looks into

}  // namespace

// -- what checks ask (standin.py)
API void standin_count(int on) { LOCKED; counting = on; if (on) counts.clear(); }

API long standin_report(char* text, long room) {    // lines of a number, a blank and a name
    LOCKED;
    std::string all;
    for (auto& each : counts) all += std::to_string(each.second) + " " + each.first + "\n";
    snprintf(text, room, "%s", all.c_str());
    return all.size();
}

API long standin_violations(char* text, long room) {
    LOCKED;
    std::string all;
    for (auto& each : violations) all += each + "\n";
    snprintf(text, room, "%s", all.c_str());
    return all.size();
}

API long standin_nodes() { return capture.nodes; }  // of the last capture

// -- launches
API void** __cudaRegisterFatBinary(void*) { return (void**)something; }
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
    LOCKED;
    kernels[host] = name;
}
API void __cudaRegisterVar(void**, char* host, char*, const char*, int, size_t bytes, int, int) { LOCKED; variables[host] = bytes; }
API unsigned __cudaPushCallConfiguration(Dimensions grid, Dimensions block, size_t shared, void* stream) {
    pushed = {grid, block, shared, stream};
    return 0;
}
API Error __cudaPopCallConfiguration(Dimensions* grid, Dimensions* block, size_t* shared, void* stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *(void**)stream = pushed.stream;
    return 0;
}
API Error __cudaGetKernel(void** kernel, const void* function) { *kernel = (void*)function; return 0; }
API Error __cudaLaunchKernel(void* function, Dimensions, Dimensions, void**, size_t, void* stream) { return launched(function, stream); }
API Error cudaLaunchKernel(const void* function, Dimensions, Dimensions, void**, size_t, void* stream) { return launched(function, stream); }
API Error cudaLaunchCooperativeKernel(const void* function, Dimensions, Dimensions, void**, size_t, void* stream) {
    return launched(function, stream);
}
API Error cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* function, void**) { return launched(function, how->stream); }
API Error cudaLaunchHostFunc(void*, void*, void*) { return unsafe("cudaLaunchHostFunc"); }
API Error cudaStreamAddCallback(void*, void*, void*, unsigned) { return unsafe("cudaStreamAddCallback"); }

// -- kernels that are compiled while the program runs
API Error cuModuleLoadData(void** module, const void*) { *module = something; return 0; }
API Error cuModuleGetFunction(void** function, void*, const char* name) { LOCKED; kernels[*function = strdup(name)] = name; return 0; }
API Error cuLaunchKernel(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void* stream, void**, void**) {
    return launched(function, stream);
}
API Error cuCtxGetCurrent(void** context) { *context = something; return 0; }
API Error cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { *flags = 0; *active = 1; return 0; }
API Error cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) { *blocks = 2; return 0; }

// -- the device: one like an H100
API Error cudaGetDeviceCount(int* count) { *count = 1; return 0; }
API Error cudaGetDevice(int* device) { *device = 0; return 0; }
API Error cudaDeviceCanAccessPeer(int* can, int, int) { *can = 0; return 0; }
API Error cudaDriverGetVersion(int* version) { *version = 13000; return 0; }
API Error cudaRuntimeGetVersion(int* version) { *version = CUDART; return 0; }
API Error cudaGetDeviceProperties(cudaDeviceProp* p, int) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "stand-in for a GPU");
    p->major = 9;
    p->totalGlobalMem = 80ull << 30;
    p->multiProcessorCount = 132;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = 227 << 10;
    p->sharedMemPerMultiprocessor = 228 << 10;
    p->l2CacheSize = 50 << 20;
    p->maxBlocksPerMultiProcessor = 32;
    p->concurrentKernels = p->unifiedAddressing = 1;
    p->textureAlignment = 512;
    int threads[] = {1024, 1024, 64}, blocks[] = {2147483647, 65535, 65535};
    memcpy(p->maxThreadsDim, threads, sizeof threads);
    memcpy(p->maxGridSize, blocks, sizeof blocks);
    return 0;
}
API Error cudaDeviceGetAttribute(int* value, int attribute, int) {
    static const std::map<int, int> known = {
        {cudaDevAttrComputeCapabilityMajor, 9}, {cudaDevAttrComputeCapabilityMinor, 0}, {cudaDevAttrWarpSize, 32},
        {cudaDevAttrMultiProcessorCount, 132}, {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
        {cudaDevAttrMaxSharedMemoryPerBlock, 48 << 10}, {cudaDevAttrMaxSharedMemoryPerBlockOptin, 227 << 10},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 << 10}};
    auto found = known.find(attribute);
    *value = found == known.end() ? 1 : found->second;
    return 0;
}
API Error cudaDeviceGetDefaultMemPool(void** pool, int) { *pool = something; return 0; }
API Error cudaDeviceGetPCIBusId(char* text, int room, int) { snprintf(text, room, "0000:00:00.0"); return 0; }
API Error cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { *least = 0; *greatest = -5; return 0; }
API Error cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 32;
    found->binaryVersion = found->ptxVersion = 90;
    return 0;
}
API Error cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) { *blocks = 2; return 0; }
API Error cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) { *blocks = 2; return 0; }
API Error nothing() { return 0; }
API Error cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long, int* status) {
    *function = (void*)nothing;
    if (status) *status = 0;
    return 0;
}
API const char* cudaGetErrorName(int) { return "an error of the stand-in"; }
API const char* cudaGetErrorString(int error) {
    switch (error) {
        case UNSUPPORTED: return "operation not permitted when stream is capturing";
        case INVALIDATED: return "operation failed due to a previous error during capture";
        case UNJOINED: return "capturing stream has unjoined work";
        case ISOLATION: return "dependency created on uncaptured work in another stream";
        case IMPLICIT: return "operation would make the legacy stream depend on a capturing blocking stream";
        default: return "no such error here";
    }
}

// -- memory and copies
API Error cudaMalloc(void** made, size_t bytes) { return allocate(on_device, made, bytes, "cudaMalloc"); }
API Error cudaMallocAsync(void** made, size_t bytes, void*) { return allocate(on_device, made, bytes, "cudaMallocAsync"); }
API Error cudaHostAlloc(void** made, size_t bytes, unsigned) { return allocate(pinned, made, bytes, "cudaHostAlloc"); }
API Error cudaFree(void* place) { return release(on_device, place, "cudaFree"); }
API Error cudaFreeAsync(void* place, void*) { return release(on_device, place, "cudaFreeAsync"); }
API Error cudaFreeHost(void* place) { return release(pinned, place, "cudaFreeHost"); }
API Error cudaHostRegister(void* place, size_t bytes, unsigned) { LOCKED; pinned[(char*)place] = bytes; return 0; }
API Error cudaHostUnregister(void* place) { LOCKED; pinned.erase((char*)place); return 0; }
API Error cudaMemcpy(void* to, const void* from, size_t bytes, int) { return copy(to, from, bytes, nullptr, true); }
API Error cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, void* stream) { return copy(to, from, bytes, stream, false); }
API Error cudaMemcpy2DAsync(void* to, size_t pitch, const void* from, size_t from_pitch, size_t wide, size_t high, int, void* stream) {
    work("copy of rows", stream);
    for (size_t i = 0; i < high; i++) memmove((char*)to + i * pitch, (const char*)from + i * from_pitch, wide);
    return 0;
}
API Error cudaMemset(void* place, int value, size_t bytes) { memset(place, value, bytes); return unsafe("cudaMemset"); }
API Error cudaMemsetAsync(void* place, int value, size_t bytes, void* stream) { memset(place, value, bytes); return work("memset", stream); }
API Error cudaMemGetInfo(size_t* free, size_t* all) { *free = 70ull << 30; *all = 80ull << 30; return 0; }
API Error cudaPointerGetAttributes(cudaPointerAttributes* found, const void* place) {
    LOCKED;
    memset(found, 0, sizeof *found);
    found->type = lies_in(on_device, place) ? cudaMemoryTypeDevice : lies_in(pinned, place) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    found->devicePointer = found->hostPointer = (void*)place;
    return 0;
}
API Error cudaGetSymbolAddress(void** place, const void* symbol) {
    LOCKED;
    static std::map<const void*, void*> known;
    void*& found = known[symbol];
    if (!found) found = calloc(1, variables[symbol] + 1);
    *place = found;
    return 0;
}

// -- streams, events, captures
API Error cudaStreamCreateWithPriority(void** made, unsigned, int) { LOCKED; stream_of(*made = malloc(64)); return 0; }
API Error cudaStreamCreate(void** made) { return cudaStreamCreateWithPriority(made, 0, 0); }
API Error cudaStreamGetPriority(void*, int* priority) { *priority = 0; return 0; }
API Error cudaStreamQuery(void*) { return unsafe("cudaStreamQuery"); }
API Error cudaStreamSynchronize(void*) { { LOCKED; count("wait"); } return unsafe("cudaStreamSynchronize"); }
API Error cudaDeviceSynchronize() { { LOCKED; count("wait"); } return unsafe("cudaDeviceSynchronize"); }
API Error cudaEventCreateWithFlags(void** made, unsigned) { *made = new Event(); return 0; }
API Error cudaEventCreate(void** made) { return cudaEventCreateWithFlags(made, 0); }
API Error cudaEventDestroy(void* event) { delete (Event*)event; return 0; }
API Error cudaEventElapsedTime(float* ms, void*, void*) { *ms = 1; return 0; }
API Error cudaEventQuery(void*) { return unsafe("cudaEventQuery"); }
API Error cudaEventSynchronize(void*) { { LOCKED; count("wait"); } return unsafe("cudaEventSynchronize"); }
API Error cudaEventRecord(void* handle, void* stream_handle) {
    LOCKED;
    Stream& stream = stream_of(stream_handle);
    *(Event*)handle = {is_captured(stream) ? capture.number : 0, true, stream.seen};
    return 0;
}
API Error cudaEventRecordWithFlags(void* event, void* stream, unsigned) { return cudaEventRecord(event, stream); }
API Error cudaStreamWaitEvent(void* stream_handle, void* event_handle, unsigned) {
    LOCKED;
    Stream& stream = stream_of(stream_handle);
    Event& event = *(Event*)event_handle;
    if (capture.running && event.capture == capture.number) {
        if (is_legacy(stream_handle)) return refuse("the legacy stream waits for captured work", IMPLICIT);
        stream.capture = capture.number;                    // and so it is part of the capture
    } else if (is_captured(stream) && event.recorded) {
        return refuse("captured work waits for work that is not captured", ISOLATION);
    }
    for (auto& each : event.seen) stream.seen[each.first] = std::max(stream.seen[each.first], each.second);
    return 0;
}
API Error cudaThreadExchangeStreamCaptureMode(int* other) { std::swap(mode, *other); return 0; }
API Error cudaStreamBeginCapture(void* handle, int) {
    LOCKED;
    if (capture.running) return refuse("a capture inside a capture", UNSUPPORTED);
    capture = {capture.number + 1, true, false, &stream_of(handle), 0};
    capture.origin->capture = capture.number;
    return 0;
}
API Error cudaStreamEndCapture(void*, void** graph) {
    LOCKED;
    Error error = capture.broken ? INVALIDATED : 0;
    for (auto& each : streams) {
        Stream& stream = each.second;
        if (is_captured(stream) && capture.origin->seen[stream.number] < stream.seen[stream.number]) error = refuse("a stream is not joined", UNJOINED);
    }
    capture.running = false;
    *graph = error ? nullptr : something;
    return error;
}
API Error cudaStreamGetCaptureInfo(void* handle, int* status, unsigned long long* number, void*, void*, void*, void*) {
    LOCKED;
    bool captured = is_captured(stream_of(handle));
    *status = !captured ? 0 : capture.broken ? 2 : 1;
    if (number) *number = captured ? capture.number : 0;
    return 0;
}
API Error cudaStreamIsCapturing(void* handle, int* status) { LOCKED; *status = is_captured(stream_of(handle)); return 0; }
API Error cudaGraphInstantiateWithFlags(void** made, void*, unsigned long long) { *made = something; return 0; }
API Error cudaGraphGetNodes(void*, void**, size_t* count) { *count = capture.nodes; return 0; }
API Error cudaGraphNodeGetDependencies(void*, void**, void*, size_t* count) { *count = 0; return 0; }
API Error cudaGraphLaunch(void*, void* stream) { return work("graph", stream); }

// -- cuBLAS and cuDNN: handles know their stream
API Error cublasCreate_v2(void** made) { *made = calloc(1, 64); return 0; }
API Error cublasSetStream_v2(void* handle, void* stream) { *(void**)handle = stream; return 0; }
API Error cublasGetMathMode(void*, int* mode) { *mode = 0; return 0; }
API Error cublasGetPointerMode_v2(void*, int* mode) { *mode = 0; return 0; }
API size_t cublasLtGetVersion() { return 130200; }
API Error cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* found, int* count) {
    memset(found, 0, 96);
    *count = 1;
    return 0;
}
API Error cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*, void*, void*,
                         const void*, void*, size_t, void* stream) { return work("cublasLtMatmul", stream); }
API Error standin_call(const char* name, void* handle) { return work(name, *(void**)handle); }

API Error cudnnCreate(void** made) { *made = calloc(1, 64); return 0; }
API Error cudnnSetStream(void* handle, void* stream) { *(void**)handle = stream; return 0; }
API Error cudnnGetStream(void* handle, void** stream) { *stream = *(void**)handle; return 0; }
API size_t cudnnGetVersion() { return CUDNN; }
API size_t cudnnGetCudartVersion() { return CUDART; }
API const char* cudnnGetErrorString(int) { return "an error of the stand-in"; }
API void cudnnGetLastErrorString(char* text, size_t room) { if (room) *text = 0; }
API Error cudnnGetProperty(int part, int* value) { *value = part == 0 ? CUDNN / 10000 : part == 1 ? CUDNN / 100 % 100 : CUDNN % 100; return 0; }
API Error cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*, size_t* bytes) {
    *bytes = 0;
    return 0;
}
API Error cudnnGetBatchNormalizationBackwardExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*, void*, void*, size_t* bytes) {
    *bytes = 0;
    return 0;
}
API Error cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void*, int, int, void*, void*, size_t* bytes) { *bytes = 0; return 0; }

// cuDNN's graphs: one engine for everything, which needs no workspace and has no notes
API Error cudnnBackendCreateDescriptor(int, void** made) { *made = calloc(1, 4096); return 0; }
API Error cudnnBackendGetAttribute(void*, int attribute, int type, long, long* count, void* value) {
    const int numerical_note = 1303, behavior_note = 1305, int64 = 3;
    if (count) *count = attribute != numerical_note && attribute != behavior_note;
    if (value && type == int64) *(long*)value = 0;
    return 0;
}
API Error cudnnBackendExecute(void* handle, void*, void*) { return work("convolution by cuDNN", *(void**)handle); }
