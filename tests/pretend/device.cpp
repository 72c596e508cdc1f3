// A CUDA device made of the processor: tensors lie in host memory behind `cuda:0`, and every operation runs on the CPU.
//
// It refuses what a GPU refuses (operands on two devices) and reports what the host waits for (values that it reads, and
// copies from memory that is not pinned).
// It says nothing about kernels, speed or memory. To be loaded before torch is imported, in builds of it without CUDA.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <set>
#include <string>

namespace {

using at::Tensor;
const c10::Device CUDA(c10::kCUDA, 0);

void (*on_read)(const char*) = nullptr;
void read(const std::string& what) {
  if (on_read) on_read(what.c_str());
}

// -- the device: one, always current, without streams ----------------------------------------------------------------

struct Guard : public c10::impl::NoOpDeviceGuardImpl<c10::kCUDA> {
  c10::Stream stream() const { return c10::Stream(c10::Stream::DEFAULT, CUDA); }
  c10::Device exchangeDevice(c10::Device) const override { return CUDA; }
  c10::Device getDevice() const override { return CUDA; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { read("synchronize"); }
  void synchronizeEvent(void*) const override { read("synchronize"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { read("synchronize"); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

void release(void* data) { c10::GetCPUAllocator()->raw_deleter()(data); }

struct Memory : public c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::GetCPUAllocator()->raw_allocate(bytes);
    return {data, data, &release, CUDA};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;

// what `tensor.pin_memory()` took, so that `is_pinned` knows it
std::set<const void*> pinned;
void unpin(void* data) {
  pinned.erase(data);
  release(data);
}
struct Pinned : public c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::GetCPUAllocator()->raw_allocate(bytes);
    pinned.insert(data);
    return {data, data, &unpin, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Pinned pinned_memory;

}  // namespace

namespace at {
struct PretendHooks : public CUDAHooksInterface {
  PretendHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  void setCurrentDevice(DeviceIndex) const override {}
  bool isPinnedPtr(const void* data) const override { return pinned.count(data) > 0; }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
};
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", PretendHooks);
}  // namespace at

namespace {

// -- tensors ---------------------------------------------------------------------------------------------------------

const c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(dtype));
}

// The same memory as a tensor of the CPU.
Tensor host(const Tensor& x) {
  if (!x.defined() || !x.is_cuda()) return x;
  auto options = at::TensorOptions().dtype(x.dtype()).device(c10::kCPU);
  if (!x.numel()) return at::empty_strided(x.sizes(), x.strides(), options);
  auto out = at::from_blob(x.mutable_data_ptr(), x.sizes(), x.strides(), options);
  if (x.is_neg()) out = out._neg_view();
  return out;
}

Tensor& copy_(Tensor& self, const Tensor& src, bool non_blocking) {
  if (src.is_cuda() && !self.is_cuda()) read("copy to the host");
  if (self.is_cuda() && !src.is_cuda() && !(non_blocking && pinned.count(src.storage().data())))
    read("copy to the device");  // from pinned memory it runs beside the host
  at::NoGradGuard no_grad;
  host(self).copy_(host(src));
  return self;
}

// A new tensor of the device with what one of the CPU holds.
Tensor device(const Tensor& x) {
  if (!x.defined() || x.is_cuda()) return x;
  Tensor out = at::detail::empty_strided_generic(x.sizes(), x.strides(), &memory, KEYS, x.scalar_type());
  host(out).copy_(x);
  return out;
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  const c10::Storage& storage = self.storage();
  const size_t bytes = (self.storage_offset() + self.numel()) * self.element_size();
  if (storage.nbytes() < bytes) {
    c10::DataPtr larger = memory.allocate(bytes);
    if (storage.nbytes()) memory.copy_data(larger.get(), storage.data(), storage.nbytes());
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(larger));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  if (stride.empty() && !size.empty()) {
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride);
  }
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage storage) {
  int64_t count = storage.nbytes() / self.element_size();
  return set_storage(self, std::move(storage), 0, {count}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Scalar item(const Tensor& x) {
  read("item");
  return at::_local_scalar_dense(host(x));
}

// attention by its definition, as the fused kernels are the GPU's own
int64_t choose_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                         std::optional<double>, bool) {
  return 0;
}

// -- everything else -------------------------------------------------------------------------------------------------

const std::set<std::string> READS{"nonzero",    "masked_select", "_unique",  "_unique2",   "unique_dim",
                                  "is_nonzero", "bincount",      "equal",    "multinomial", "unique_consecutive",
                                  "histc",      "argwhere"};
// kernels that take one number from the host beside tensors of the device
const std::set<std::string> TAKES_NUMBER{
    "add",  "sub",     "rsub",      "mul",        "div",         "true_divide", "floor_divide", "remainder",   "fmod",
    "pow",  "eq",      "ne",        "lt",         "le",          "gt",          "ge",           "maximum",     "minimum",
    "fmax", "fmin",    "where",     "masked_fill", "fill",       "atan2",       "bitwise_and",  "bitwise_or",  "bitwise_xor",
    "xlogy", "index_put", "_index_put_impl", "logical_and", "logical_or",  "logical_xor", "copysign",     "hypot"};

// Whether the operation's result, or its check, depends on values, so that the host waits for them.
bool reads_values(const std::string& name, const torch::jit::Stack& arguments, const c10::FunctionSchema& schema) {
  auto argument = [&](const char* wanted) -> const c10::IValue* {
    for (size_t i = 0; i < schema.arguments().size(); ++i)
      if (schema.arguments()[i].name() == wanted) return &arguments[i];
    return nullptr;
  };
  if (READS.count(name)) return true;
  if (name == "repeat_interleave") return argument("output_size")->isNone();
  if (name == "segment_reduce") return !argument("lengths")->isNone() && !argument("unsafe")->toBool();
  const auto* indices = argument("indices");
  if (!indices || name.find("index") == std::string::npos || !indices->isList()) return false;
  const auto* values = argument("values");
  if (values && values->toTensor().numel() == 1) return false;  // becomes masked_fill
  for (const c10::IValue& index : indices->toListRef())
    if (index.isTensor() && (index.toTensor().scalar_type() == at::kBool || index.toTensor().scalar_type() == at::kByte))
      return true;
  return false;
}

struct Call {
  std::vector<std::pair<Tensor, Tensor>> seen;  // of the device, and the same of the CPU
  std::vector<Tensor> plain;

  Tensor take(const Tensor& x) {
    if (!x.defined()) return x;
    if (!x.is_cuda()) {
      plain.push_back(x);
      return x;
    }
    for (auto& [mine, other] : seen)
      if (mine.is_same(x)) return other;
    seen.emplace_back(x, host(x));
    return seen.back().second;
  }

  Tensor give(const Tensor& x) {
    for (auto& [mine, other] : seen)
      if (other.is_same(x)) return mine;
    return device(x);
  }

  c10::IValue map(const c10::IValue& value, bool taking) {
    if (value.isTensor()) return taking ? take(value.toTensor()) : give(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> out;
      for (const Tensor x : value.toTensorList()) out.push_back(taking ? take(x) : give(x));
      return out;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> out;
      for (const std::optional<Tensor> x : value.toOptionalTensorList())
        out.push_back(x ? std::optional<Tensor>(taking ? take(*x) : give(*x)) : x);
      return out;
    }
    if (taking && value.isDevice()) return c10::Device(c10::kCPU);
    return value;
  }
};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string full = schema.name(), name = full.substr(full.find("::") + 2);
  const size_t count = schema.arguments().size(), first = stack->size() - count;
  for (const auto& result : schema.returns())
    TORCH_CHECK(!result.alias_info() || result.alias_info()->isWrite(), "the pretend device lacks the view ", full);
  torch::jit::Stack arguments(stack->begin() + first, stack->end());
  if (reads_values(name, arguments, schema)) read(name);
  Call call;
  for (size_t i = 0; i < count; ++i) {
    const size_t before = call.plain.size();
    (*stack)[first + i] = call.map(arguments[i], true);
    if (schema.arguments()[i].name() == "indices" && !call.seen.empty() && arguments[0].isTensor() &&
        arguments[0].toTensor().is_cuda())
      call.plain.resize(before);  // a tensor of the device may be indexed from the host
  }
  for (const Tensor& x : call.plain)
    TORCH_CHECK(call.seen.empty() || (x.dim() == 0 && TAKES_NUMBER.count(name.substr(0, name.find_last_not_of('_') + 1))),
                "Expected all tensors to be on the same device, but ", full, " found at least two devices, cuda:0 and cpu");
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    op.callBoxed(stack);
  }
  for (auto& [mine, other] : call.seen)  // an `out=` that the operation has made larger
    if (mine.sizes() != other.sizes()) {
      mine.resize_(other.sizes());
      host(mine).copy_(other);
    }
  const size_t results = schema.returns().size(), start = stack->size() - results;
  for (size_t i = 0; i < results; ++i) (*stack)[start + i] = call.map((*stack)[start + i], false);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("copy_", &copy_);
  m.impl("_local_scalar_dense", &item);
  m.impl("_fused_sdp_choice", &choose_attention);
}

const bool ready = (c10::SetAllocator(c10::kCUDA, &memory), true);

}  // namespace

extern "C" void pretend_on_read(void (*callback)(const char*)) { on_read = callback; }
