// The Python face of the extension: the ops, which read Python's arguments and run what was decided of their key, and
// facts of the build.
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>

#include "autograd/bottleneck.h"
#include "autograd/lowrank.h"
#include "autograd/shared_shrink.h"
#include "autograd/structured.h"
#include "dropout.h"
#include "triton_launch/launch.h"

namespace py = pybind11;
using peft_fused::BottleneckArguments;
using peft_fused::Control;
using peft_fused::Dropout;
using peft_fused::LowRankArguments;
using peft_fused::BottleneckGradLaunch;
using peft_fused::BottleneckPlan;
using peft_fused::BottleneckRowsLaunch;
using peft_fused::LowRankLaunch;
using peft_fused::LowRankPlan;
using peft_fused::Method;
using peft_fused::Structure;
using peft_fused::StructuredArguments;

namespace triton = peft_fused::triton;

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

// An index, or a pair of them.
bool read_pair(const py::object& value, Control& first, bool& has_first, Control& second, bool& has_second) {
  if (PyTuple_Check(value.ptr()) || PyList_Check(value.ptr())) {
    const auto pair = py::reinterpret_borrow<py::sequence>(value);
    return pair.size() == 2 && read_index(pair[0], first, has_first) && read_index(pair[1], second, has_second);
  }
  return read_index(value, first, has_first) && read_index(value, second, has_second);
}

bool read_dropout(const py::object& p, const py::object& seed, Dropout& dropout) {
  Control control;
  if (!read_control(p, control) || control.tensor.defined()) return false;
  dropout.p = control.number;
  if (seed.is_none()) return true;
  if (THPVariable_Check(seed.ptr())) {
    dropout.seed_tensor = THPVariable_Unpack(seed.ptr());
    return true;
  }
  if (!PyLong_Check(seed.ptr()) || PyBool_Check(seed.ptr())) return false;
  int overflow = 0;
  dropout.seed = PyLong_AsLongLongAndOverflow(seed.ptr(), &overflow);
  return overflow == 0;
}

bool read_flag(const py::object& value, bool& flag) {
  flag = value.ptr() == Py_True;
  return PyBool_Check(value.ptr());
}

bool read_tensor(const py::object& value, at::Tensor& tensor, bool required) {
  if (!required && value.is_none()) return true;
  if (!THPVariable_Check(value.ptr())) return false;
  tensor = THPVariable_Unpack(value.ptr());
  return true;
}

// What becomes of a call, by the decisions that Python keeps by their keys (ops/operation.py): None for one that is
// unusual (see Key), its key where nothing is decided yet, the decision where it is for another node, else the result of
// run(decision). Under autocast a call is unusual until what becomes of it has been decided, and wherever it does not run
// here: Python has to cast it then.
template <typename Arguments, typename Run>
py::object decided(const py::dict& decisions, Arguments& arguments, bool readable, Run run) {
  if (!readable) return py::none();
  const auto key = peft_fused::key_of(arguments);
  constexpr bool castable = requires { peft_fused::autocast(arguments); };
  if (!key.usual() || (key.cast() && !castable)) return py::none();
  py::bytes bytes(key.data(), key.size());
  PyObject* found = PyDict_GetItemWithError(decisions.ptr(), bytes.ptr());
  if (found == nullptr) {
    if (PyErr_Occurred()) throw py::error_already_set();
    return key.cast() ? py::object(py::none()) : std::move(bytes);
  }
  static PyObject* const native = PyUnicode_InternFromString("native");
  const auto decision = py::reinterpret_borrow<py::object>(found);
  const auto here = py::reinterpret_steal<py::object>(PyObject_GetAttr(found, native));
  if (!here) throw py::error_already_set();
  if (here.ptr() != Py_True) return key.cast() ? py::object(py::none()) : decision;
  if constexpr (castable) {
    if (key.cast()) peft_fused::autocast(arguments);
  }
  return py::cast(run(decision));
}

// ---------------------------------------------------------------------------------- Triton's kernels, launched from C++

LowRankLaunch launch_of(const py::object& launch) {
  LowRankLaunch made;
  if (launch.is_none()) return made;
  const auto get = [&](const char* name) { return launch.attr(name).cast<int64_t>(); };
  made.block_m = get("block_m"), made.block_n = get("block_n"), made.block_r = get("block_r");
  made.num_warps = get("num_warps"), made.num_stages = get("num_stages");
  made.block_k = get("block_k"), made.splits = get("splits");
  if (const py::object most = launch.attr("maxnreg"); !most.is_none()) made.maxnreg = most.cast<int64_t>();
  return made;
}

LowRankPlan plan_of(const py::object& plan, LowRankPlan made = {}) {
  const auto get = [&](const char* name) { return launch_of(plan.attr(name)); };
  made.single_kernel = plan.attr("forward").cast<std::string>() == "single_kernel";
  made.one_pass_b = !plan.attr("grad_b").is_none();
  made.fused_a = plan.attr("fused_a").cast<bool>();
  made.shrink = get("shrink"), made.expand = get("expand"), made.linear = get("linear");
  made.grad_b = get("grad_b"), made.dsu = get("dsu"), made.db = get("db");
  made.grad_a = get("grad_a"), made.reduce = get("reduce");
  return made;
}

BottleneckPlan plan_of(const py::object& plan, BottleneckPlan made) {
  const auto registers = [](const py::object& launch) {
    const py::object most = launch.attr("maxnreg");
    return most.is_none() ? int64_t{0} : most.cast<int64_t>();
  };
  const auto rows = [&](const char* name) {
    std::vector<BottleneckRowsLaunch> launches;
    for (const auto& item : plan.attr(name)) {
      const auto launch = py::reinterpret_borrow<py::object>(item);
      const auto get = [&](const char* field) { return launch.attr(field).cast<int64_t>(); };
      launches.push_back({launch.attr("shrink").cast<bool>(), launch.attr("expand").cast<bool>(), get("block_m"),
                          get("block_k"), get("block_n"), get("block_r"), get("num_warps"), get("num_stages"),
                          registers(launch), get("splits")});
    }
    return launches;
  };
  const auto grad = [&](const char* name) {
    const py::object launch = plan.attr(name);
    const auto get = [&](const char* field) { return launch.attr(field).cast<int64_t>(); };
    return BottleneckGradLaunch{get("block_m"),    get("block_x"),    get("block_r"), get("num_warps"),
                                get("num_stages"), registers(launch), get("splits")};
  };
  made.forward = rows("forward"), made.backward = rows("backward");
  made.grad_down = grad("grad_down"), made.grad_up = grad("grad_up");
  const py::object last = plan.attr("reduce");
  const auto get = [&](const char* field) { return last.attr(field).cast<int64_t>(); };
  made.reduce_p = get("block_p"), made.reduce_x = get("block_x"), made.reduce_r = get("block_r");
  made.reduce_warps = get("num_warps");
  return made;
}

// A plan of triton_kernels for the C++ node. precision(): the word for fp32 products, None where it makes no difference.
template <typename Plan>
class ForNode {
 public:
  ForNode(const py::object& plan, py::object precision) : precision_(std::move(precision)) {
    for (int i = 0; i < 2; ++i) {
      made_[i] = c10::make_intrusive<peft_fused::OnTriton<Plan>>();
      made_[i]->plan = plan_of(plan, Plan{});
      made_[i]->precision = i;
    }
  }
  const c10::intrusive_ptr<peft_fused::OnTriton<Plan>>& launched() const {
    const bool tf32 = !precision_.is_none() && precision_().template cast<std::string>() == triton::kWords[1];
    return made_[tf32];
  }

 private:
  py::object precision_;
  std::array<c10::intrusive_ptr<peft_fused::OnTriton<Plan>>, 2> made_;
};

// What is given of a decision to an op's node.
template <typename Plan>
c10::intrusive_ptr<peft_fused::OnTriton<Plan>> on_triton(const py::object& decision) {
  const py::object plan = decision.attr("plan");
  return plan.is_none() ? nullptr : plan.cast<const ForNode<Plan>&>().launched();
}

// Fields of a call of Python's, settled and by rows.
class SettledCall {
 public:
  explicit SettledCall(const py::object& call) : call_(call) {}
  at::Tensor tensor(const char* name) const {
    const py::object value = call_.attr(name);
    return value.is_none() ? at::Tensor() : value.cast<at::Tensor>();
  }
  Control control(const char* name, double absent) const {
    const py::object value = call_.attr(name);
    Control found;
    found.number = absent;
    if (!value.is_none() && !read_control(value, found)) throw py::type_error(std::string(name) + " is no number");
    return found;
  }
  template <typename T>
  T get(const char* name) const {
    return call_.attr(name).cast<T>();
  }

 private:
  const py::object& call_;
};

template <typename Run>
auto below_autograd(Run run) {
  const py::gil_scoped_release release;
  const peft_fused::BelowAutograd guard;
  return run();
}

py::dict gradients(std::initializer_list<std::pair<const char*, at::Tensor>> found) {
  py::dict grads;
  for (const auto& [name, gradient] : found)
    if (gradient.defined()) grads[name] = gradient;
  return grads;
}

// What nodes in Python and traced graphs run: forward and backward without autograd, of a call of ops/lowrank.py.
peft_fused::LowRankTritonCall lowrank_call(const py::object& call, int precision) {
  const SettledCall c(call);
  peft_fused::LowRankTritonCall made{c.tensor("x"), c.tensor("weight"), c.tensor("add"), c.tensor("bias"), c.tensor("A"),
                                     c.tensor("B"), c.tensor("u"), c.tensor("v"), c.tensor("seed")};
  made.scale = c.control("scale", 1.0);
  made.rank = c.control("rank", static_cast<double>(made.B.size(-1)));
  made.expert_a = c.control("expert_a", 0), made.expert_b = c.control("expert_b", 0);
  made.threshold = c.get<int64_t>("threshold"), made.frozen = c.get<bool>("frozen"), made.precision = precision;
  made.S = c.tensor("S");
  return made;
}

std::pair<at::Tensor, at::Tensor> lowrank_forward(const ForNode<LowRankPlan>& plan, const py::object& call) {
  const auto on_triton = plan.launched();
  const auto settled = lowrank_call(call, on_triton->precision);
  return below_autograd([&] { return peft_fused::lowrank_triton_fwd(settled, on_triton->plan); });
}

py::dict lowrank_backward(const ForNode<LowRankPlan>& plan, const at::Tensor& dy, const py::object& call,
                          const std::optional<at::Tensor>& S, const py::set& needs) {
  const auto on_triton = plan.launched();
  const auto settled = lowrank_call(call, on_triton->precision);
  const auto need = [&](const char* name) { return needs.contains(name); };
  const peft_fused::LowRankNeeds wanted{need("x"), need("weight"), need("bias"), need("A"), need("B"), need("u"), need("v"), need("S")};
  const auto found = below_autograd([&] {
    return peft_fused::lowrank_triton_bwd(dy, settled, S.value_or(at::Tensor()), wanted, on_triton->plan);
  });
  return gradients({{"x", found.x}, {"weight", found.weight}, {"bias", found.bias}, {"A", found.A}, {"B", found.B},
                    {"u", found.u}, {"v", found.v}, {"S", found.S}});
}

// Members of one product with x: shared_shrink_fwd and shared_shrink_bwd of triton_kernels/lowrank.py.
using OptionalTensor = std::optional<at::Tensor>;

std::vector<at::Tensor> shared_forward(const ForNode<LowRankPlan>& plan, const at::Tensor& x,
                                       const std::vector<at::Tensor>& factors, int64_t threshold,
                                       const OptionalTensor& seeds) {
  const auto on_triton = plan.launched();
  const peft_fused::SharedShrinkTritonCall call{x, factors, seeds.value_or(at::Tensor()), threshold,
                                                on_triton->precision};
  return below_autograd([&] { return peft_fused::shared_shrink_triton_fwd(call, on_triton->plan); });
}

std::pair<OptionalTensor, std::vector<OptionalTensor>> shared_backward(
    const ForNode<LowRankPlan>& plan, const std::vector<OptionalTensor>& grads, const OptionalTensor& x,
    const std::vector<at::Tensor>& factors, const OptionalTensor& onto, int64_t threshold, const OptionalTensor& seeds,
    bool need_x, const std::vector<bool>& needs) {
  const auto on_triton = plan.launched();
  const peft_fused::SharedShrinkTritonCall call{x.value_or(at::Tensor()), factors, seeds.value_or(at::Tensor()),
                                                threshold, on_triton->precision};
  std::vector<at::Tensor> defined;
  for (const auto& dS : grads) defined.push_back(dS.value_or(at::Tensor()));
  const auto found = below_autograd([&] {
    return peft_fused::shared_shrink_triton_bwd(defined, onto.value_or(at::Tensor()), call, need_x, needs,
                                                on_triton->plan);
  });
  std::vector<OptionalTensor> of_factors;
  for (const auto& dA : found.factors) of_factors.push_back(peft_fused::optional(dA));
  return {peft_fused::optional(found.x), of_factors};
}

// The same of ops/bottleneck.py. activation: as the kernels are compiled for it.
peft_fused::BottleneckTritonCall bottleneck_call(const py::object& call, int precision) {
  const SettledCall c(call);
  peft_fused::BottleneckTritonCall made{c.tensor("h"), c.tensor("down"), c.tensor("down_bias"), c.tensor("up"),
                                        c.tensor("up_bias"), c.tensor("residual")};
  made.scale = c.control("scale", 1.0);
  made.expert_d = c.control("expert_d", 0), made.expert_u = c.control("expert_u", 0);
  made.activation = peft_fused::activation_word(c.get<std::string>("activation"));
  made.precision = precision;
  return made;
}

std::pair<at::Tensor, at::Tensor> bottleneck_forward(const ForNode<BottleneckPlan>& plan, const py::object& call) {
  const auto on_triton = plan.launched();
  const auto settled = bottleneck_call(call, on_triton->precision);
  return below_autograd([&] { return peft_fused::bottleneck_triton_fwd(settled, on_triton->plan); });
}

// shapes: of every input by name, None for an absent one; type: a parameter, whose type the gradients have.
py::dict bottleneck_backward(const ForNode<BottleneckPlan>& plan, const at::Tensor& dy, const py::object& call,
                             const std::optional<at::Tensor>& z, const std::vector<int64_t>& down,
                             const std::vector<int64_t>& up, at::ScalarType type, bool residual_is_h,
                             const py::set& needs) {
  const auto on_triton = plan.launched();
  const auto settled = bottleneck_call(call, on_triton->precision);
  const auto need = [&](const char* name) { return needs.contains(name); };
  const peft_fused::BottleneckNeeds wanted{need("h"), need("down"), need("down_bias"), need("up"), need("up_bias")};
  const auto last = [](const std::vector<int64_t>& sizes, int back) { return sizes[sizes.size() - back]; };
  const peft_fused::BottleneckShape shape{down.size() == 3 ? down[0] : 0, up.size() == 3 ? up[0] : 0, last(down, 2),
                                          last(down, 1), last(up, 2), type, residual_is_h};
  const auto found = below_autograd([&] {
    return peft_fused::bottleneck_triton_bwd(dy, settled, z.value_or(at::Tensor()), shape, wanted, on_triton->plan);
  });
  return gradients({{"h", found.h}, {"down", found.down}, {"down_bias", found.down_bias}, {"up", found.up},
                    {"up_bias", found.up_bias}});
}

// One argument for Python's compiler, as triton_kernels/compiled.py reads it.
py::object described(const triton::Argument& a) {
  switch (a.tag) {
    case 'N': return py::none();
    case 'P':
    case 'A': return py::make_tuple(c10::toString(a.type), a.tag == 'A');
    case 'f': return py::float_(0.5);
    case 'b': return py::bool_(a.value != 0);
    case 'w': return py::str(triton::kWords[a.value]);
    case 't': return py::make_tuple(c10::toString(static_cast<at::ScalarType>(a.value)));
    default: return py::int_(a.value);
  }
}

void configure_triton(const std::vector<std::string>& specialised, const py::object& compile) {
  // Held for ever: a launch may come from a thread that outlives the interpreter's objects.
  PyObject* const function = py::object(compile).release().ptr();
  triton::configure(specialised, [function](const char* kernel, int device, at::ArrayRef<triton::Argument> arguments,
                                            const triton::Options& given) {
    const py::gil_scoped_acquire gil;
    py::list described_arguments;
    for (const auto& a : arguments) described_arguments.append(described(a));
    py::dict options;
    options["num_warps"] = given.num_warps, options["num_stages"] = given.num_stages;
    options["maxnreg"] = given.maxnreg > 0 ? py::object(py::int_(given.maxnreg)) : py::none();
    const auto [handle, threads, shared] =
        py::reinterpret_borrow<py::function>(function)(kernel, device, described_arguments, options)
            .cast<std::tuple<uint64_t, unsigned, unsigned>>();
    return triton::Compiled{reinterpret_cast<void*>(handle), threads, shared};
  });
}

py::list recorded_launches() {
  py::list found;
  for (const auto& one : triton::recorded()) {
    py::list arguments;
    for (const auto& bytes : one.arguments) arguments.append(py::bytes(bytes));
    found.append(py::make_tuple(one.function, py::make_tuple(one.grid[0], one.grid[1], one.grid[2]), one.threads,
                                one.shared, one.stream, arguments, one.tensors));
  }
  return found;
}

py::object lowrank(const py::dict& decisions, const py::object& x, const py::object& weight, const py::object& add,
                   const py::object& bias, const py::object& A, const py::object& B, const py::object& u, const py::object& v,
                   const py::object& S, const py::object& scale, const py::object& rank, const py::object& expert,
                   const py::object& dropout_p, const py::object& seed, const py::object& frozen) {
  LowRankArguments a;
  const bool readable =
      read_tensor(x, a.x, true) && read_tensor(weight, a.weight, false) && read_tensor(add, a.add, false) &&
      read_tensor(bias, a.bias, false) && read_tensor(A, a.A, S.is_none()) && read_tensor(B, a.B, true) &&
      read_tensor(u, a.u, false) && read_tensor(v, a.v, false) && read_tensor(S, a.S, false) && read_control(scale, a.scale) &&
      read_index(rank, a.rank, a.has_rank) &&
      read_pair(expert, a.expert_a, a.has_expert_a, a.expert_b, a.has_expert_b) &&
      read_dropout(dropout_p, seed, a.dropout) && read_flag(frozen, a.frozen);
  return decided(decisions, a, readable, [&](const py::object& decision) {
    auto plan = on_triton<LowRankPlan>(decision);
    const py::gil_scoped_release release;
    return peft_fused::lowrank(a, std::move(plan));
  });
}

py::object bottleneck(const py::dict& decisions, const py::object& h, const py::object& down, const py::object& down_bias, const py::object& up,
                      const py::object& up_bias, const py::object& residual, const py::object& activation,
                      const py::object& scale, const py::object& expert) {
  BottleneckArguments a;
  const bool readable = read_tensor(h, a.h, true) && read_tensor(down, a.down, true) &&
                        read_tensor(down_bias, a.down_bias, false) && read_tensor(up, a.up, true) &&
                        read_tensor(up_bias, a.up_bias, false) && read_tensor(residual, a.residual, false) &&
                        read_control(scale, a.scale) &&
                        read_pair(expert, a.expert_d, a.has_expert_d, a.expert_u, a.has_expert_u) &&
                        PyUnicode_Check(activation.ptr());
  if (readable) a.activation = py::cast<std::string>(activation);
  return decided(decisions, a, readable, [&](const py::object& decision) {
    auto plan = on_triton<BottleneckPlan>(decision);
    const py::gil_scoped_release release;
    return peft_fused::bottleneck(a, std::move(plan));
  });
}

py::object shared_shrink(const py::dict& decisions, const py::object& x, const py::sequence& factors,
                         const py::object& dropout_p, const py::object& out_features) {
  peft_fused::SharedShrinkArguments a;
  Control outputs;
  bool has_outputs = false;
  bool readable = read_tensor(x, a.x, true) && read_dropout(dropout_p, py::none(), a.dropout) &&
                  read_index(out_features, outputs, has_outputs) && !outputs.tensor.defined();
  for (const auto& factor : factors) {
    a.factors.emplace_back();
    readable = readable && read_tensor(py::reinterpret_borrow<py::object>(factor), a.factors.back(), true);
  }
  a.out_features = static_cast<int64_t>(outputs.number);
  return decided(decisions, a, readable && !a.factors.empty(), [&](const py::object& decision) {
    auto plan = on_triton<LowRankPlan>(decision);
    const py::gil_scoped_release release;
    return peft_fused::shared_shrink(a, std::move(plan));
  });
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

py::object structured(const py::dict& decisions, const py::object& x, const py::object& p, const py::object& q,
                      const py::object& add, const std::string& kind, const py::object& out_features,
                      const py::object& scale, const py::object& dropout_p, const py::object& seed,
                      const py::object& transposed, const py::object& names) {
  StructuredArguments a;
  a.kind = kind;
  Control outputs;
  bool has_outputs = false;
  const bool readable = read_tensor(x, a.x, true) && read_tensor(p, a.p, true) && read_tensor(q, a.q, false) &&
                        read_tensor(add, a.add, false) && read_index(out_features, outputs, has_outputs) &&
                        !outputs.tensor.defined() && std::abs(outputs.number) < 1e15 && read_control(scale, a.scale) &&
                        read_dropout(dropout_p, seed, a.dropout) && read_flag(transposed, a.transposed);
  if (has_outputs) a.out_features = static_cast<int64_t>(outputs.number);
  return decided(decisions, a, readable, [&](const py::object& decision) {
    const auto [method, length, n, matrix] =
        decision.attr("plan").cast<std::tuple<std::string, int64_t, int64_t, py::object>>();
    const auto [p_name, q_name] = names.cast<std::pair<std::string, std::optional<std::string>>>();
    peft_fused::StructuredPath path;
    path.structure = named<Structure>("structure", kind, {"circulant", "toeplitz", "kronecker"});
    path.method = named<Method>("method", method, {"fft", "dense", "gemm"});
    path.p_name = p_name, path.q_name = q_name.value_or("q");
    path.n = n, path.length = length;
    if (!matrix.is_none()) path.matrix = matrix(x, p, q).cast<at::Tensor>();
    const py::gil_scoped_release release;
    return peft_fused::structured(a, path);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Autograd functions of peft_fused in C++.";
  m.def("lowrank", &lowrank, "The op of ops/lowrank.py, if the decisions say so of this call.");
  m.def("bottleneck", &bottleneck, "The op of ops/bottleneck.py, if the decisions say so of this call.");
  m.def("shared_shrink", &shared_shrink, "The op of ops/shared_shrink.py, if the decisions say so of this call.");
  m.def("shared_shrink_ran", &peft_fused::shared_shrink_ran, "Whether backward has run through what made this S.");
  m.def("structured", &structured, "A structured op of ops/structured/engine.py, if the decisions say so of this call.");
  m.def("drop", [](const at::Tensor& x, const at::Tensor& seed, int64_t threshold, int64_t first_row) {
    py::gil_scoped_release release;
    return peft_fused::drop(x, seed, threshold, first_row);
  }, "Dropout of ops/dropout.py on a 2-D tensor, without a gradient.");
  m.def("configure", [](bool onednn, int64_t onednn_least) {
    peft_fused::settings().onednn = onednn;
    peft_fused::settings().onednn_least = onednn_least;
  }, "What ops/dispatch.py decided for this machine.");
  py::class_<ForNode<LowRankPlan>>(m, "LowRankOnTriton", "A plan of triton_kernels/lowrank_plan.py for the C++ node.")
      .def(py::init<const py::object&, py::object>())
      .def("forward", &lowrank_forward, "(y, S) of a settled call by rows.")
      .def("backward", &lowrank_backward, "The gradients by name of a settled call by rows.")
      .def("shared_forward", &shared_forward, "S_i of members of one product.")
      .def("shared_backward", &shared_backward, "(dX, dA_i) of members of one product.");
  py::class_<ForNode<BottleneckPlan>>(m, "BottleneckOnTriton", "One of triton_kernels/bottleneck_plan.py.")
      .def(py::init<const py::object&, py::object>())
      .def("forward", &bottleneck_forward, "(y, z) of a settled call by rows.")
      .def("backward", &bottleneck_backward, "The gradients by name of a settled call by rows.");
  m.attr("triton_kernels") = std::vector<std::string>(std::begin(triton::kKernelNames), std::end(triton::kKernelNames));
  m.def("configure_triton", &configure_triton, "Who compiles kernels, and how their parameters are specialised.");
  m.def("triton_launches", &recorded_launches, "What was launched since, of launches that go to a list.");
  m.def("send_triton_launches", [](const std::string& where) {
    const auto destination = named<triton::Destination>("where", where, {"driver", "list", "nowhere"});
    triton::send_to(destination);
    peft_fused::settings().cpu_is_device = destination != triton::Destination::driver;
  }, "Where launches go: to the driver, to a list or nowhere.");
  m.def("has_cuda", [] {
#ifdef PEFT_FUSED_CUDA
    return true;
#else
    return false;
#endif
  });
}
