// The Python face of the extension: the autograd functions and facts of the build. No logic.
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "autograd/lowrank.h"
#include "dropout.h"

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Autograd functions of peft_fused in C++.";
  m.def("lowrank", &lowrank,
        "The op of ops/lowrank.py, or None where Python has to decide: bad arguments, autocast, another backend.");
  m.def("drop", [](const at::Tensor& x, const at::Tensor& seed, int64_t threshold, int64_t first_row) {
    py::gil_scoped_release release;
    return peft_fused::drop(x, seed, threshold, first_row);
  }, "Dropout of ops/dropout.py on a 2-D tensor, without a gradient.");
  m.def("configure", [](bool onednn, int64_t onednn_least, double launch_bound) {
    peft_fused::lowrank_settings() = {onednn, onednn_least, launch_bound};
  }, "What ops/dispatch.py decided for this machine.");
  m.def("has_cuda", [] {
#ifdef PEFT_FUSED_CUDA
    return true;
#else
    return false;
#endif
  });
}
