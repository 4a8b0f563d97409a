// The Python face of the extension: the autograd functions and facts of the build. No logic.
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "autograd/bottleneck.h"
#include "autograd/lowrank.h"
#include "autograd/structured.h"
#include "dropout.h"
#include "fft_host.h"
#include "kernels/fft_plan.h"

namespace py = pybind11;
using peft_fused::Control;
using peft_fused::LowRankArguments;

namespace {

// False for an object that is neither a number nor a tensor; Python's checks say so to the caller.
bool read_control(const py::object& value, Control& control) {
  if (THPVariable_Check(value.ptr())) {
    control.tensor = THPVariable_Unpack(value.ptr());
    return true;
  }
  if (PyBool_Check(value.ptr())) return false;
  if (PyLong_Check(value.ptr()) || PyFloat_Check(value.ptr())) {
    control.number = PyFloat_AsDouble(value.ptr());
    if (!PyErr_Occurred()) return true;
    PyErr_Clear();
  }
  return false;
}

bool read_index(const py::object& value, Control& control, bool& present) {
  present = !value.is_none();
  return !present || (!PyFloat_Check(value.ptr()) && read_control(value, control));
}

bool read_experts(const py::object& value, LowRankArguments& a) {
  if (PyTuple_Check(value.ptr()) || PyList_Check(value.ptr())) {
    const auto pair = py::reinterpret_borrow<py::sequence>(value);
    return pair.size() == 2 && read_index(pair[0], a.expert_a, a.has_expert_a) &&
           read_index(pair[1], a.expert_b, a.has_expert_b);
  }
  return read_index(value, a.expert_a, a.has_expert_a) && read_index(value, a.expert_b, a.has_expert_b);
}

bool read_seed(const py::object& value, LowRankArguments& a) {
  if (value.is_none()) return true;
  if (THPVariable_Check(value.ptr())) {
    a.seed_tensor = THPVariable_Unpack(value.ptr());
    return true;
  }
  if (!PyLong_Check(value.ptr()) || PyBool_Check(value.ptr())) return false;
  int overflow = 0;
  a.seed = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  return overflow == 0;
}

bool read_tensor(const py::object& value, at::Tensor& tensor, bool required) {
  if (!required && value.is_none()) return true;
  if (!THPVariable_Check(value.ptr())) return false;
  tensor = THPVariable_Unpack(value.ptr());
  return true;
}

py::object lowrank(const py::object& x, const py::object& weight, const py::object& add, const py::object& bias,
                   const py::object& A, const py::object& B, const py::object& scale, const py::object& rank,
                   const py::object& expert, const py::object& u, const py::object& v, const py::object& dropout_p,
                   const py::object& seed, const py::object& frozen, const std::optional<std::string>& backend) {
  LowRankArguments a;
  a.frozen = frozen.ptr() == Py_True;
  Control p;
  const bool readable =
      read_tensor(x, a.x, true) && read_tensor(weight, a.weight, false) && read_tensor(add, a.add, false) &&
      read_tensor(bias, a.bias, false) && read_tensor(A, a.A, true) && read_tensor(B, a.B, true) &&
      read_tensor(u, a.u, false) && read_tensor(v, a.v, false) && read_control(scale, a.scale) &&
      read_index(rank, a.rank, a.has_rank) && read_experts(expert, a) && read_seed(seed, a) &&
      read_control(dropout_p, p) && !p.tensor.defined() && PyBool_Check(frozen.ptr());
  if (!readable) return py::none();
  a.dropout_p = p.number;
  at::Tensor y;
  {
    py::gil_scoped_release release;
    y = peft_fused::lowrank(std::move(a), backend.value_or(""));
  }
  return y.defined() ? py::cast(y) : py::none();
}

bool read_pair(const py::object& value, Control& first, Control& second) {
  bool present;
  if (PyTuple_Check(value.ptr()) || PyList_Check(value.ptr())) {
    const auto pair = py::reinterpret_borrow<py::sequence>(value);
    return pair.size() == 2 && read_index(pair[0], first, present) && read_index(pair[1], second, present);
  }
  return read_index(value, first, present) && read_index(value, second, present);
}

py::object bottleneck(const py::object& h, const py::object& down, const py::object& down_bias, const py::object& up,
                      const py::object& up_bias, const py::object& activation, const py::object& residual,
                      const py::object& scale, const py::object& expert, const std::optional<std::string>& backend) {
  peft_fused::BottleneckArguments a;
  const bool readable = read_tensor(h, a.h, true) && read_tensor(down, a.down, true) &&
                        read_tensor(down_bias, a.down_bias, false) && read_tensor(up, a.up, true) &&
                        read_tensor(up_bias, a.up_bias, false) && read_tensor(residual, a.residual, false) &&
                        read_control(scale, a.scale) && read_pair(expert, a.expert_d, a.expert_u) &&
                        PyUnicode_Check(activation.ptr());
  if (!readable) return py::none();
  a.activation = py::cast<std::string>(activation);
  at::Tensor y;
  {
    py::gil_scoped_release release;
    y = peft_fused::bottleneck(a, backend.value_or(""));
  }
  return y.defined() ? py::cast(y) : py::none();
}

at::ScalarType type_of_name(const std::string& name) {
  return name == "float32"    ? at::kFloat
         : name == "float16"  ? at::kHalf
         : name == "bfloat16" ? at::kBFloat16
         : name == "float64"  ? at::kDouble
                              : at::ScalarType::Undefined;
}

// The member of an enum that a name stands for, in the enum's order. ValueError for an unknown name.
template <typename Enum>
Enum named(const char* argument, const std::string& name, std::initializer_list<const char*> names) {
  int i = 0;
  for (const char* known : names) {
    if (name == known) return static_cast<Enum>(i);
    ++i;
  }
  throw py::value_error(std::string(argument) + " is unknown: " + name);
}

at::Tensor structured(const std::string& structure, const std::string& method,
                      const std::pair<std::string, std::string>& names, const at::Tensor& x,
                      const at::Tensor& p, const std::optional<at::Tensor>& q, const std::optional<at::Tensor>& add,
                      int64_t n, int64_t length, const py::object& scale, int64_t threshold,
                      const std::optional<at::Tensor>& seed, const std::optional<at::Tensor>& matrix) {
  using peft_fused::Method;
  using peft_fused::Structure;
  peft_fused::StructuredArguments a;
  a.structure = named<Structure>("structure", structure, {"circulant", "toeplitz", "kronecker"});
  a.method = named<Method>("method", method, {"fft", "dense", "gemm"});
  a.p_name = names.first, a.q_name = names.second;
  a.x = x, a.p = p, a.q = q.value_or(at::Tensor()), a.add = add.value_or(at::Tensor());
  a.n = n, a.length = length, a.threshold = threshold;
  a.seed = seed.value_or(at::Tensor()), a.matrix = matrix.value_or(at::Tensor());
  TORCH_CHECK_TYPE(read_control(scale, a.scale), "scale must be a number or a tensor");
  const py::gil_scoped_release release;
  return peft_fused::structured(a);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Autograd functions of peft_fused in C++.";
  m.def("lowrank", &lowrank,
        "The op of ops/lowrank.py, or None where Python has to decide: bad arguments, autocast, another backend.");
  m.def("lowrank_serves", [](const std::string& device, const std::string& dtype, const std::string& adapter_dtype,
                             bool uv, double multiply_adds, const std::string& backend) {
    return (device == "cpu" || device == "cuda") &&
           peft_fused::lowrank_serves(device == "cuda", type_of_name(dtype), type_of_name(adapter_dtype), uv,
                                      multiply_adds, backend);
  }, "Whether the C++ node runs a problem of lowrank: the rule that the node itself follows.");
  m.def("bottleneck", &bottleneck, "The op of ops/bottleneck.py, or None where Python has to decide.");
  m.def("structured", &structured, "A structured op of ops/structured/engine.py, whose arguments that has checked.");
  m.def("drop", [](const at::Tensor& x, const at::Tensor& seed, int64_t threshold, int64_t first_row) {
    py::gil_scoped_release release;
    return peft_fused::drop(x, seed, threshold, first_row);
  }, "Dropout of ops/dropout.py on a 2-D tensor, without a gradient.");
  m.def("fft_length", &peft_fused::fft_length, py::arg("least"), "The next length of kernels/fft_plan.h, or 0.");
  m.def("fft_radices", py::overload_cast<int64_t>(&peft_fused::fft_radices), py::arg("length"),
        "Radices of the passes of kernels/fft_plan.h.");
  m.def("fft_twiddles", py::overload_cast<int64_t>(&peft_fused::fft_twiddles), py::arg("length"),
        "The twiddle table of kernels/fft_plan.h, complex64 on the CPU.");
  m.def("fft_convolve_host", [](const at::Tensor& x, const at::Tensor& khat, const at::Tensor& twiddles, int64_t n_out,
                                bool conjugate, const std::optional<at::Tensor>& add, double scale,
                                const std::optional<at::Tensor>& seed, int64_t threshold, bool mask_output,
                                bool backwards) {
    py::gil_scoped_release release;
    return peft_fused::fft_convolve_host(x, khat, twiddles, n_out, add, mask_output,
                                         {seed, threshold, scale, conjugate, backwards});
  }, py::arg("x"), py::arg("khat"), py::arg("twiddles"), py::arg("n_out"), py::arg("conjugate") = false,
     py::arg("add") = py::none(), py::arg("scale") = 1.0, py::arg("seed") = py::none(), py::arg("threshold") = 0,
     py::arg("mask_output") = false, py::arg("backwards") = false,
     "The convolution kernel of kernels/fft.h, run by the CPU for tests.");
  m.def("fft_correlate_host", [](const at::Tensor& x, const at::Tensor& dy, const at::Tensor& khat,
                                 const at::Tensor& twiddles, int64_t blocks, bool conjugate, double scale,
                                 const std::optional<at::Tensor>& seed, int64_t threshold, bool backwards) {
    py::gil_scoped_release release;
    return peft_fused::fft_correlate_host(x, dy, khat, twiddles, blocks,
                                          {seed, threshold, scale, conjugate, backwards});
  }, py::arg("x"), py::arg("dy"), py::arg("khat"), py::arg("twiddles"), py::arg("blocks") = 1,
     py::arg("conjugate") = false, py::arg("scale") = 1.0, py::arg("seed") = py::none(), py::arg("threshold") = 0,
     py::arg("backwards") = false, "(dx, partial) of the backward kernel of kernels/fft.h, run by the CPU for tests.");
  m.def("configure", [](bool onednn, int64_t onednn_least, double launch_bound) {
    peft_fused::settings() = {onednn, onednn_least, launch_bound};
  }, "What ops/dispatch.py decided for this machine.");
  m.def("has_cuda", [] {
#ifdef PEFT_FUSED_CUDA
    return true;
#else
    return false;
#endif
  });
}
