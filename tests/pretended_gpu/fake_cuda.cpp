// One CUDA device for a build of torch without CUDA: no kernels, no memory, only the answers that torch's core needs.
//
// Loaded before `import torch`. Tensors of this device are Python wrappers around CPU tensors (gpu.py).

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/Device.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdint>
#include <map>
#include <mutex>

namespace {

const c10::Device THE_DEVICE(c10::DeviceType::CUDA, 0);
const c10::Stream THE_STREAM(c10::Stream::DEFAULT, THE_DEVICE);

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return THE_DEVICE; }
  c10::Device getDevice() const override { return THE_DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return THE_STREAM; }
  c10::Stream getDefaultStream(c10::Device) const override { return THE_STREAM; }
  c10::Stream getNewStream(c10::Device, int) const override { return THE_STREAM; }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

// Page-locked memory: plain memory whose addresses are noted, so that `is_pinned` can answer.
class PinnedMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr memory = c10::GetCPUAllocator()->allocate(bytes);
    void* start = memory.get();
    if (start == nullptr) return memory;
    auto* owner = new Block{this, std::move(memory)};
    std::lock_guard<std::mutex> lock(mutex_);
    blocks_[reinterpret_cast<std::uintptr_t>(start)] = bytes;
    return {start, owner, &PinnedMemory::release, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  bool contains(const void* pointer) {
    const auto address = reinterpret_cast<std::uintptr_t>(pointer);
    std::lock_guard<std::mutex> lock(mutex_);
    auto after = blocks_.upper_bound(address);
    if (after == blocks_.begin()) return false;
    --after;
    return address < after->first + after->second;
  }

 private:
  struct Block {
    PinnedMemory* owner;
    c10::DataPtr memory;
  };
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    {
      std::lock_guard<std::mutex> lock(block->owner->mutex_);
      block->owner->blocks_.erase(reinterpret_cast<std::uintptr_t>(block->memory.get()));
    }
    delete block;
  }
  std::mutex mutex_;
  std::map<std::uintptr_t, size_t> blocks_;
};

PinnedMemory& pinned_memory() {
  static auto* memory = new PinnedMemory();  // never destroyed: tensors may outlive main
  return *memory;
}

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

namespace at {
// torch looks the hooks up by this name.
struct CUDAHooks : public CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory(); }
  bool isPinnedPtr(const void* pointer) const override { return pinned_memory().contains(pointer); }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at
