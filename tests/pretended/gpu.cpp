// What PyTorch's C++ asks of a GPU before it computes anything: a build for CPUs has none of it. Everything is device 0,
// everything is one stream, and nothing is ever in flight. tests/pretended/gpu.py has the tensors.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <mutex>
#include <set>

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

static Device here() { return Device(DeviceType::CUDA, 0); }
static Stream only() { return Stream(Stream::DEFAULT, here()); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return here(); }
  Device getDevice() const override { return here(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return only(); }
  Stream getNewStream(Device, int) const override { return only(); }
  Stream getDefaultStream(Device) const override { return only(); }
  Stream exchangeStream(Stream) const noexcept override { return only(); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};

// Memory that counts as page-locked is memory that was asked for as such.
struct Pinned final : c10::Allocator {
  static inline std::mutex mutex;
  static inline std::set<const void*> given;

  static void drop(void* at) {
    std::lock_guard<std::mutex> lock(mutex);
    given.erase(at);
    std::free(at);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* at = std::malloc(bytes ? bytes : 1);
    std::lock_guard<std::mutex> lock(mutex);
    given.insert(at);
    return {at, at, &drop, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &drop; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  Allocator* getPinnedMemoryAllocator() const override {
    static Pinned pinned;
    return &pinned;
  }
  bool isPinnedPtr(const void* at) const override {
    std::lock_guard<std::mutex> lock(Pinned::mutex);
    return Pinned::given.count(at) > 0;
  }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at
