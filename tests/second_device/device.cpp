// A second device for tests. Its memory is the host's and its arithmetic the CPU's, but to torch it is another device:
// what mixes its tensors with the CPU's fails as it does on CUDA, so code that takes a CPU for granted is found on a
// machine without an accelerator. It takes the key of HPU, whose own backend lives outside torch.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/HPUHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <vector>

namespace {
constexpr auto kType = c10::DeviceType::HPU;
const c10::Device kDevice(kType, 0);

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? std::malloc(bytes) : nullptr;
    return {data, data, &std::free, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Allocator allocator;
REGISTER_ALLOCATOR(kType, &allocator);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(HPU, Guard);

void grow(const c10::Storage& storage, size_t bytes) {
  auto fresh = allocator.allocate(bytes);
  std::memcpy(fresh.get(), storage.data(), std::min(bytes, storage.nbytes()));
  storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
  storage.unsafeGetStorageImpl()->set_nbytes(bytes);
}

bool here(const at::Tensor& x) { return x.defined() && x.device().type() == kType; }

at::Tensor host(const at::Tensor& x) {  // the same memory, seen from the CPU
  if (!here(x)) return x;
  auto alias = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(c10::Storage::use_byte_size_t(), x.storage().nbytes(),
                   c10::DataPtr(const_cast<void*>(x.storage().data()), c10::Device(c10::kCPU)),
                   c10::GetAllocator(c10::kCPU), /*resizable=*/true),
      c10::DispatchKeySet(c10::DispatchKey::CPU), x.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  if (x.is_conj()) alias._set_conj(true);
  return alias;
}

void release(void* held) { delete static_cast<at::Tensor*>(held); }

c10::Storage adopted(const at::Tensor& x) {  // a storage of the device that keeps the CPU's alive
  return {c10::Storage::use_byte_size_t(), x.storage().nbytes(),
          c10::DataPtr(const_cast<void*>(x.storage().data()), new at::Tensor(x), &release, kDevice), &allocator,
          /*resizable=*/true};
}

at::Tensor device_alias(const c10::Storage& storage, const at::Tensor& like) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::HPU), like.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return out;
}

template <class Turn>
void replace(c10::IValue& value, Turn turn) {  // each tensor in an argument or a result
  if (value.isTensor()) {
    value = turn(value.toTensor());
  } else if (value.isTensorList()) {
    std::vector<at::Tensor> turned;
    for (const at::Tensor& x : value.toTensorVector()) turned.push_back(turn(x));
    value = c10::IValue(turned);
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> turned;
    for (const std::optional<at::Tensor>& x : value.toOptionalTensorVector())
      turned.push_back(x ? std::optional<at::Tensor>(turn(*x)) : std::nullopt);
    value = c10::IValue(turned);
  }
}

// Any operator: computed by the CPU's kernel on the same memory. As on CUDA, a scalar or an index may come from the CPU.
void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto begin = stack->end() - schema.arguments().size();
  std::vector<at::Tensor> given, aliases;
  at::Tensor foreign;
  bool to_host = false;
  for (auto value = begin; value != stack->end(); ++value) {
    replace(*value, [&](const at::Tensor& x) {
      if (x.defined() && !here(x) && x.dim() > 0) foreign = x;
      if (!here(x)) return x;
      given.push_back(x);
      aliases.push_back(host(x));
      return aliases.back();
    });
    if (value->isDevice()) {
      to_host = value->toDevice().type() == c10::kCPU;
      *value = c10::IValue(c10::Device(c10::kCPU));
    }
  }
  TORCH_CHECK(given.empty() || !foreign.defined() || schema.name().find("index") != std::string::npos, schema.name(),
              ": a tensor of sizes ", foreign.sizes(), " is on ", foreign.device(), ", another on ", kDevice);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (size_t k = 0; k < given.size(); ++k) {  // outputs that were given may have been resized
    auto* impl = given[k].unsafeGetTensorImpl();
    if (aliases[k].storage().data() != given[k].storage().data()) impl->set_storage_keep_dtype(adopted(aliases[k]));
    if (aliases[k].sizes() != given[k].sizes() || aliases[k].strides() != given[k].strides())
      impl->set_sizes_and_strides(aliases[k].sizes(), aliases[k].strides(), aliases[k].storage_offset());
  }
  for (auto value = stack->end() - schema.returns().size(); value != stack->end(); ++value) {
    replace(*value, [&](const at::Tensor& x) -> at::Tensor {
      if (!x.defined() || to_host) return x;
      for (size_t k = 0; k < given.size(); ++k) {
        if (x.unsafeGetTensorImpl() == aliases[k].unsafeGetTensorImpl()) return given[k];
        if (x.storage().data() == given[k].storage().data() && x.storage().data() != nullptr)
          return device_alias(given[k].storage(), x);
      }
      return device_alias(adopted(x), x);
    });
  }
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::HPU),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::HPU),
                                           c10::dtype_or_default(dtype));
}

at::Tensor& copy(at::Tensor& to, const at::Tensor& from, bool) {
  host(to).copy_(host(from));
  return to;
}

at::Scalar item(const at::Tensor& x) { return host(x).item(); }

at::Tensor& set_storage(at::Tensor& x, at::Storage storage, int64_t offset, c10::IntArrayRef size,
                        c10::IntArrayRef stride) {
  x.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  std::vector<int64_t> strides(stride.begin(), stride.end());
  if (stride.empty() && !size.empty()) {
    strides.assign(size.size(), 1);
    for (auto k = size.size() - 1; k > 0; --k) strides[k - 1] = strides[k] * size[k];
  }
  x.unsafeGetTensorImpl()->set_sizes_and_strides(size, strides, offset);
  return x;
}

at::Tensor& set_tensor(at::Tensor& x, const at::Tensor& source) {
  return set_storage(x, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

int64_t attention_choice(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                         double, bool, std::optional<double>, bool) {
  return 0;  // written out
}

TORCH_LIBRARY_IMPL(aten, HPU, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy);
  m.impl("_local_scalar_dense", &item);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("_fused_sdp_choice", &attention_choice);
  m.impl("resize_", [](const at::Tensor& x, c10::IntArrayRef size, std::optional<at::MemoryFormat>) -> const at::Tensor& {
    auto bytes = at::detail::computeStorageNbytesContiguous(size, x.itemsize());
    if (bytes > x.storage().nbytes()) grow(x.storage(), bytes);
    x.unsafeGetTensorImpl()->set_sizes_contiguous(size);
    return x;
  });
}

TORCH_LIBRARY_IMPL(_, HPU, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
}  // namespace

namespace at {
struct HPUHooks final : HPUHooksInterface {
  explicit HPUHooks(HPUHooksArgs) {}
  void init() const override {}
  bool hasHPU() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};
REGISTER_HPU_HOOKS(HPUHooks);
}  // namespace at
