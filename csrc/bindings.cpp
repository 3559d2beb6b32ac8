// Registration with torch, namespace `infopo_kernels_cpp`. The ops take tensors, check that all reads and writes stay
// in bounds, and pass raw pointers on. The caller checks labels (a label outside the vocabulary is safe; its l is NaN).
//
// Only this file calls torch, and only through its stable ABI (TORCH_TARGET_VERSION in setup.py). With Python's limited
// API, one build serves every torch from 2.10 and every Python from 3.10.

#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "errors.h"
#include "linear_logprob.h"
#include "threads.h"

namespace infopo {

int64_t num_threads() { return torch::stable::get_num_threads(); }

void parallel_parts(int64_t n, void (*body)(int64_t begin, int64_t end, void* context), void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

std::string text(IntHeaderOnlyArrayRef numbers) {
  std::string result = "[";
  for (const int64_t number : numbers) result += (result.size() > 1 ? ", " : "") + std::to_string(number);
  return result + "]";
}

Dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      type_error("`", name, "` must be float32, bfloat16 or float16, got ", toString(x.scalar_type()), ".");
  }
}

void check_vector(const Tensor& x, const char* name, int64_t n, ScalarType dtype) {
  if (x.scalar_type() != dtype) {
    type_error("`", name, "` must be ", toString(dtype), ", got ", toString(x.scalar_type()), ".");
  }
  if (x.dim() != 1 || x.size(0) != n || !x.is_contiguous()) {
    value_error("`", name, "` must be [", n, "], contiguous; got ", text(x.sizes()), " with strides ",
                text(x.strides()), ".");
  }
}

Matrix check_matrix(const Tensor& x, const char* name) {
  if (x.dim() != 2) value_error("`", name, "` must have 2 dimensions, got ", text(x.sizes()), ".");
  if (x.stride(1) != 1 && x.size(1) != 1) {
    value_error("`", name, "` must have stride 1 in its last dimension, got ", text(x.strides()),
                "; call contiguous().");
  }
  return {.data = x.const_data_ptr(), .stride = x.stride(0), .dtype = dtype_of(x, name)};
}

Head check_head(const Tensor& hidden, const Tensor& weight, const MaybeTensor& bias, const Tensor& labels,
                std::optional<double> softcap, double scale, int64_t workspace_bytes, double tail_threshold = 0) {
  const Matrix x = check_matrix(hidden, "hidden"), w = check_matrix(weight, "weight");
  const int64_t N = hidden.size(0), H = hidden.size(1), V = weight.size(0);
  if (x.dtype != w.dtype) {
    type_error("`weight` must have the type of `hidden`, ", toString(hidden.scalar_type()), ", got ",
               toString(weight.scalar_type()), ".");
  }
  if (weight.size(1) != H || H <= 0 || V <= 0) {
    value_error("`weight` must be [V, ", H, "], got ", text(weight.sizes()), ".");
  }
  if (bias) check_vector(*bias, "bias", V, hidden.scalar_type());
  check_vector(labels, "labels", N, ScalarType::Long);
  return {.hidden = x,
          .weight = w,
          .N = N,
          .V = V,
          .H = H,
          .map = {.bias = bias ? bias->const_data_ptr() : nullptr,
                  .bias_dtype = x.dtype,
                  .softcap = static_cast<float>(softcap.value_or(0)),
                  .scale = static_cast<float>(scale)},
          .workspace_bytes = workspace_bytes,
          .tail_threshold = static_cast<float>(tail_threshold)};
}

Gradients check_gradients(const Head& head, const Tensor& hidden, const MaybeTensor& grad_hidden,
                          const MaybeTensor& grad_weight, const MaybeTensor& grad_bias) {
  Gradients to{.weight_dtype = head.weight.dtype};
  if (grad_hidden) {
    if (grad_hidden->dim() != 2 || grad_hidden->size(0) != head.N || grad_hidden->size(1) != head.H ||
        !grad_hidden->is_contiguous() || grad_hidden->scalar_type() != hidden.scalar_type()) {
      value_error("`grad_hidden` must be contiguous and like `hidden` ", text(hidden.sizes()), ", got ",
                  toString(grad_hidden->scalar_type()), " ", text(grad_hidden->sizes()), ".");
    }
    to.hidden = grad_hidden->mutable_data_ptr();
  }
  if (grad_weight) {
    to.weight_dtype = dtype_of(*grad_weight, "grad_weight");
    if (grad_weight->dim() != 2 || grad_weight->size(0) != head.V || grad_weight->size(1) != head.H ||
        !grad_weight->is_contiguous() || (to.weight_dtype != head.weight.dtype && to.weight_dtype != Dtype::kFloat32)) {
      value_error("`grad_weight` must be a contiguous [", head.V, ", ", head.H,
                  "] of the weight's type or float32, got ", toString(grad_weight->scalar_type()), " ",
                  text(grad_weight->sizes()), ".");
    }
    to.weight = grad_weight->mutable_data_ptr();
  }
  if (grad_bias) {
    check_vector(*grad_bias, "grad_bias", head.V, ScalarType::Float);
    to.bias = static_cast<float*>(grad_bias->mutable_data_ptr());
  }
  return to;
}

TailReport check_report(const Head& head, const MaybeTensor& mass, const MaybeTensor& columns) {
  TailReport report;
  if (mass) {
    check_vector(*mass, "tail_mass", head.N, ScalarType::Float);
    report.mass = static_cast<float*>(mass->mutable_data_ptr());
  }
  if (columns) {
    check_vector(*columns, "tail_columns", 2, ScalarType::Double);
    report.columns = static_cast<double*>(columns->mutable_data_ptr());
  }
  return report;
}

const float* floats(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }
const int64_t* integers(const Tensor& x) { return static_cast<const int64_t*>(x.const_data_ptr()); }

// l and lse: [N] zeros.
std::tuple<Tensor, Tensor> row_results(const Tensor& hidden) {
  const int64_t N = hidden.size(0);
  return {torch::stable::new_zeros(hidden, {&N, 1}, ScalarType::Float),
          torch::stable::new_zeros(hidden, {&N, 1}, ScalarType::Float)};
}

float* mutable_floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

int64_t kept_rows_op(const Tensor& hidden, const Tensor& weight, const Tensor& grad_weight,
                     std::optional<double> softcap, double scale, int64_t workspace_bytes, double tail_threshold) {
  Head head{};
  head.hidden = check_matrix(hidden, "hidden");
  head.weight = check_matrix(weight, "weight");
  head.N = hidden.size(0);
  head.V = grad_weight.size(0);
  head.H = grad_weight.size(1);
  head.map.scale = static_cast<float>(scale);
  head.map.softcap = static_cast<float>(softcap.value_or(0));
  head.workspace_bytes = workspace_bytes;
  head.tail_threshold = static_cast<float>(tail_threshold);
  return kept_rows(head, {.hidden = const_cast<void*>(hidden.const_data_ptr()),  // wanted, and not touched
                          .weight = const_cast<void*>(grad_weight.const_data_ptr()),
                          .weight_dtype = dtype_of(grad_weight, "grad_weight")});
}

int64_t numbers_for_logits_op(const Tensor& hidden, const Tensor& grad_weight, int64_t rows) {
  return LogitStore::numbers_beside(select_kernels(dtype_of(hidden, "hidden")), dtype_of(grad_weight, "grad_weight"),
                                    grad_weight.size(0), grad_weight.size(1), rows);
}

// The store in `grad_weight` and in `logits`. Throws if it has too few slots for the rows that `labels` score.
LogitStore check_store(const Gradients& to, const Head& head, const MaybeTensor& logits, const Tensor& labels) {
  if (logits) check_vector(*logits, "logits", logits->numel(), ScalarType::Short);
  const LogitStore store = LogitStore::in(select_kernels(head.hidden.dtype), to.weight, to.weight_dtype, head.V, head.H,
                                          logits ? logits->mutable_data_ptr() : nullptr, logits ? logits->numel() : 0);
  const int64_t* y = integers(labels);
  const int64_t scored = head.N - std::count(y, y + head.N, kIgnoreIndex);
  if (scored > store.all_slots()) {
    value_error("at most ", store.all_slots(), " rows may be kept in the weight gradient and in `logits`, got ", scored,
                ".");
  }
  return store;
}

std::tuple<Tensor, Tensor> logprob_op(const Tensor& hidden, const Tensor& weight, const MaybeTensor& bias,
                                      const Tensor& labels, const MaybeTensor& keep, const MaybeTensor& logits,
                                      std::optional<double> softcap, double scale, int64_t workspace_bytes) {
  const Head head = check_head(hidden, weight, bias, labels, softcap, scale, workspace_bytes);
  LogitStore store{};
  if (keep) store = check_store(check_gradients(head, hidden, {}, keep, {}), head, logits, labels);
  const auto [l, lse] = row_results(hidden);
  logprob(head, integers(labels), store, mutable_floats(l), mutable_floats(lse));
  return {l, lse};
}

std::tuple<Tensor, Tensor> logprob_and_grad_op(const Tensor& hidden, const Tensor& weight, const MaybeTensor& bias,
                                               const Tensor& labels, const Tensor& row_weight,
                                               const MaybeTensor& grad_hidden, const MaybeTensor& grad_weight,
                                               const MaybeTensor& grad_bias, const MaybeTensor& tail_mass,
                                               const MaybeTensor& tail_columns, std::optional<double> softcap,
                                               double scale, int64_t workspace_bytes, double tail_threshold) {
  const Head head = check_head(hidden, weight, bias, labels, softcap, scale, workspace_bytes, tail_threshold);
  check_vector(row_weight, "row_weight", head.N, ScalarType::Float);
  Gradients to = check_gradients(head, hidden, grad_hidden, grad_weight, grad_bias);
  to.tail = check_report(head, tail_mass, tail_columns);
  const auto [l, lse] = row_results(hidden);
  logprob_and_grad(head, integers(labels), floats(row_weight), to, mutable_floats(l), mutable_floats(lse));
  return {l, lse};
}

void backward_op(const Tensor& hidden, const Tensor& weight, const MaybeTensor& bias, const Tensor& labels,
                 const Tensor& lse, const Tensor& row_weight, const MaybeTensor& grad_hidden,
                 const MaybeTensor& grad_weight, const MaybeTensor& grad_bias, const MaybeTensor& tail_mass,
                 const MaybeTensor& tail_columns, const MaybeTensor& kept, const MaybeTensor& logits,
                 std::optional<double> softcap, double scale, int64_t workspace_bytes, double tail_threshold) {
  const Head head = check_head(hidden, weight, bias, labels, softcap, scale, workspace_bytes, tail_threshold);
  check_vector(lse, "lse", head.N, ScalarType::Float);
  check_vector(row_weight, "row_weight", head.N, ScalarType::Float);
  Gradients to = check_gradients(head, hidden, grad_hidden, grad_weight, grad_bias);
  to.tail = check_report(head, tail_mass, tail_columns);
  Kept rows;
  rows.any = kept.has_value();
  if (kept) {
    check_vector(*kept, "kept", head.N, ScalarType::Long);
    if (!to.weight) value_error("`kept` needs `grad_weight`, whose memory holds the logits.");
    rows.labels = integers(*kept);
    rows.store = check_store(to, head, logits, *kept);
  }
  backward(head, integers(labels), floats(lse), floats(row_weight), to, rows);
}

std::string isa(ScalarType dtype) {
  return select_kernels(dtype == ScalarType::BFloat16 ? Dtype::kBFloat16 : Dtype::kFloat32).name;
}

}  // namespace
}  // namespace infopo

STABLE_TORCH_LIBRARY(infopo_kernels_cpp, m) {
  m.def(
      "logprob(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor(a!)? keep, "
      "Tensor(b!)? logits, float? softcap, float scale, int workspace_bytes) -> (Tensor, Tensor)");
  m.def(
      "logprob_and_grad(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor row_weight, "
      "Tensor(a!)? grad_hidden, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, Tensor(d!)? tail_mass, "
      "Tensor(e!)? tail_columns, float? softcap, float scale, int workspace_bytes, float tail_threshold) -> "
      "(Tensor, Tensor)");
  m.def(
      "backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor lse, Tensor row_weight, "
      "Tensor(a!)? grad_hidden, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, Tensor(d!)? tail_mass, "
      "Tensor(e!)? tail_columns, Tensor? kept, Tensor? logits, float? softcap, float scale, int workspace_bytes, "
      "float tail_threshold) -> ()");
  m.def("numbers_for_logits(Tensor hidden, Tensor grad_weight, int rows) -> int");
  m.def(
      "kept_rows(Tensor hidden, Tensor weight, Tensor grad_weight, float? softcap, float scale, int workspace_bytes, "
      "float tail_threshold) -> int");
  m.def("isa(ScalarType dtype) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(infopo_kernels_cpp, CPU, m) {
  m.impl("logprob", TORCH_BOX(&infopo::logprob_op));
  m.impl("logprob_and_grad", TORCH_BOX(&infopo::logprob_and_grad_op));
  m.impl("backward", TORCH_BOX(&infopo::backward_op));
  m.impl("numbers_for_logits", TORCH_BOX(&infopo::numbers_for_logits_op));
  m.impl("kept_rows", TORCH_BOX(&infopo::kept_rows_op));
}

STABLE_TORCH_LIBRARY_IMPL(infopo_kernels_cpp, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&infopo::isa)); }

// `import infopo_kernels._C` loads the library, and loading registers the ops. The module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module{PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
