// Registration with torch: namespace `infopo_kernels_cpp`, tensors in, raw pointers out, and the checks that keep reads
// and writes in bounds. Labels are checked by whoever calls (a label outside the vocabulary is safe; its l is NaN).

#include <Python.h>

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "linear_logprob.h"

namespace infopo {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

Dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "`", name, "` must be float32, bfloat16 or float16, got ", x.scalar_type(), ".");
  }
}

void check_vector(const Tensor& x, const char* name, int64_t n, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(x.scalar_type() == dtype, "`", name, "` must be ", dtype, ", got ", x.scalar_type(), ".");
  TORCH_CHECK_VALUE(x.dim() == 1 && x.size(0) == n && x.is_contiguous(), "`", name, "` must be [", n,
                    "], contiguous; got ", x.sizes(), " with strides ", x.strides(), ".");
}

Matrix check_matrix(const Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 2, "`", name, "` must have 2 dimensions, got ", x.sizes(), ".");
  TORCH_CHECK_VALUE(x.stride(1) == 1 || x.size(1) == 1, "`", name, "` must have stride 1 in its last dimension, got ",
                    x.strides(), "; call contiguous().");
  return {.data = x.const_data_ptr(), .stride = x.stride(0), .dtype = dtype_of(x, name)};
}

Head check_head(const Tensor& hidden, const Tensor& weight, const MaybeTensor& bias, const Tensor& labels,
                std::optional<double> softcap, double scale, int64_t workspace_bytes) {
  const Matrix x = check_matrix(hidden, "hidden"), w = check_matrix(weight, "weight");
  const int64_t N = hidden.size(0), H = hidden.size(1), V = weight.size(0);
  TORCH_CHECK_TYPE(x.dtype == w.dtype, "`weight` must have the type of `hidden`, ", hidden.scalar_type(), ", got ",
                   weight.scalar_type(), ".");
  TORCH_CHECK_VALUE(weight.size(1) == H && H > 0 && V > 0, "`weight` must be [V, ", H, "], got ", weight.sizes(), ".");
  if (bias) check_vector(*bias, "bias", V, hidden.scalar_type());
  check_vector(labels, "labels", N, at::kLong);
  return {.hidden = x,
          .weight = w,
          .N = N,
          .V = V,
          .H = H,
          .map = {.bias = bias ? bias->const_data_ptr() : nullptr,
                  .bias_dtype = x.dtype,
                  .softcap = static_cast<float>(softcap.value_or(0)),
                  .scale = static_cast<float>(scale)},
          .workspace_bytes = workspace_bytes};
}

Gradients check_gradients(const Head& head, const Tensor& hidden, const MaybeTensor& grad_hidden,
                          const MaybeTensor& grad_weight, const MaybeTensor& grad_bias) {
  Gradients to{.weight_dtype = head.weight.dtype};
  if (grad_hidden) {
    TORCH_CHECK_VALUE(grad_hidden->sizes() == hidden.sizes() && grad_hidden->is_contiguous() &&
                          grad_hidden->scalar_type() == hidden.scalar_type(),
                      "`grad_hidden` must be contiguous and like `hidden` ", hidden.sizes(), ", got ",
                      grad_hidden->scalar_type(), " ", grad_hidden->sizes(), ".");
    to.hidden = grad_hidden->mutable_data_ptr();
  }
  if (grad_weight) {
    to.weight_dtype = dtype_of(*grad_weight, "grad_weight");
    TORCH_CHECK_VALUE(grad_weight->dim() == 2 && grad_weight->size(0) == head.V && grad_weight->size(1) == head.H &&
                          grad_weight->is_contiguous() &&
                          (to.weight_dtype == head.weight.dtype || to.weight_dtype == Dtype::kFloat32),
                      "`grad_weight` must be a contiguous [", head.V, ", ", head.H,
                      "] of the weight's type or float32, got ", grad_weight->scalar_type(), " ", grad_weight->sizes(),
                      ".");
    to.weight = grad_weight->mutable_data_ptr();
  }
  if (grad_bias) {
    check_vector(*grad_bias, "grad_bias", head.V, at::kFloat);
    to.bias = grad_bias->mutable_data_ptr<float>();
  }
  return to;
}

int64_t kept_rows_op(const Tensor& hidden, const Tensor& grad_weight, int64_t workspace_bytes) {
  Head head{};
  head.hidden.dtype = dtype_of(hidden, "hidden");
  head.N = hidden.size(0);
  head.H = grad_weight.size(1);
  head.workspace_bytes = workspace_bytes;
  return kept_rows(head, dtype_of(grad_weight, "grad_weight"));
}

// The store in `grad_weight`, large enough for the rows that `labels` score.
LogitStore check_store(const Gradients& to, const Head& head, const Tensor& labels) {
  const LogitStore store = LogitStore::in(to.weight, to.weight_dtype, head.H);
  const int64_t* y = labels.const_data_ptr<int64_t>();
  const int64_t scored = head.N - std::count(y, y + head.N, kIgnoreIndex);
  TORCH_CHECK_VALUE(scored <= store.slots, "at most ", store.slots, " rows may be kept in the weight gradient, got ",
                    scored, ".");
  return store;
}

std::tuple<Tensor, Tensor> logprob_op(const Tensor& hidden, const Tensor& weight, const MaybeTensor& bias,
                                      const Tensor& labels, const MaybeTensor& keep, std::optional<double> softcap,
                                      double scale, int64_t workspace_bytes) {
  const Head head = check_head(hidden, weight, bias, labels, softcap, scale, workspace_bytes);
  LogitStore store{};
  if (keep) store = check_store(check_gradients(head, hidden, {}, keep, {}), head, labels);
  Tensor l = at::zeros({head.N}, hidden.options().dtype(at::kFloat)), lse = at::zeros_like(l);
  logprob(head, labels.const_data_ptr<int64_t>(), store, l.mutable_data_ptr<float>(), lse.mutable_data_ptr<float>());
  return {l, lse};
}

std::tuple<Tensor, Tensor> logprob_and_grad_op(const Tensor& hidden, const Tensor& weight, const MaybeTensor& bias,
                                               const Tensor& labels, const Tensor& row_weight,
                                               const MaybeTensor& grad_hidden, const MaybeTensor& grad_weight,
                                               const MaybeTensor& grad_bias, std::optional<double> softcap,
                                               double scale, int64_t workspace_bytes) {
  const Head head = check_head(hidden, weight, bias, labels, softcap, scale, workspace_bytes);
  check_vector(row_weight, "row_weight", head.N, at::kFloat);
  const Gradients to = check_gradients(head, hidden, grad_hidden, grad_weight, grad_bias);
  Tensor l = at::zeros({head.N}, hidden.options().dtype(at::kFloat)), lse = at::zeros_like(l);
  logprob_and_grad(head, labels.const_data_ptr<int64_t>(), row_weight.const_data_ptr<float>(), to,
                   l.mutable_data_ptr<float>(), lse.mutable_data_ptr<float>());
  return {l, lse};
}

void backward_op(const Tensor& hidden, const Tensor& weight, const MaybeTensor& bias, const Tensor& labels,
                 const Tensor& lse, const Tensor& row_weight, const MaybeTensor& grad_hidden,
                 const MaybeTensor& grad_weight, const MaybeTensor& grad_bias, const MaybeTensor& kept,
                 std::optional<double> softcap, double scale, int64_t workspace_bytes) {
  const Head head = check_head(hidden, weight, bias, labels, softcap, scale, workspace_bytes);
  check_vector(lse, "lse", head.N, at::kFloat);
  check_vector(row_weight, "row_weight", head.N, at::kFloat);
  const Gradients to = check_gradients(head, hidden, grad_hidden, grad_weight, grad_bias);
  if (kept) {
    check_vector(*kept, "kept", head.N, at::kLong);
    TORCH_CHECK_VALUE(to.weight, "`kept` needs `grad_weight`, whose memory holds the logits.");
    check_store(to, head, *kept);
  }
  backward(head, labels.const_data_ptr<int64_t>(), lse.const_data_ptr<float>(), row_weight.const_data_ptr<float>(), to,
           {.any = kept.has_value(), .labels = kept ? kept->const_data_ptr<int64_t>() : nullptr});
}

std::string isa(at::ScalarType dtype) {
  return select_kernels(dtype == at::kBFloat16 ? Dtype::kBFloat16 : Dtype::kFloat32).name;
}

}  // namespace
}  // namespace infopo

TORCH_LIBRARY(infopo_kernels_cpp, m) {
  m.def(
      "logprob(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor(a!)? keep, float? softcap, "
      "float scale, int workspace_bytes) -> (Tensor, Tensor)");
  m.def(
      "logprob_and_grad(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor row_weight, "
      "Tensor(a!)? grad_hidden, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, float? softcap, float scale, "
      "int workspace_bytes) -> (Tensor, Tensor)");
  m.def(
      "backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor lse, Tensor row_weight, "
      "Tensor(a!)? grad_hidden, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, Tensor? kept, float? softcap, "
      "float scale, int workspace_bytes) -> ()");
  m.def("kept_rows(Tensor hidden, Tensor grad_weight, int workspace_bytes) -> int");
  m.def("isa(ScalarType dtype) -> str", &infopo::isa);
}

TORCH_LIBRARY_IMPL(infopo_kernels_cpp, CPU, m) {
  m.impl("logprob", &infopo::logprob_op);
  m.impl("logprob_and_grad", &infopo::logprob_and_grad_op);
  m.impl("backward", &infopo::backward_op);
  m.impl("kept_rows", &infopo::kept_rows_op);
}

// `import infopo_kernels._C` loads the library, and that registers the ops: the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module{PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
