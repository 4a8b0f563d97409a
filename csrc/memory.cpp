#include "memory.h"

#include <ATen/EmptyTensor.h>

namespace peft_fused {

using at::Tensor;

bool in_memory(const Tensor& t) {
  // A fake tensor is on the meta device, whatever it says; other subclasses may have no storage of their own.
  if (t.unsafeGetTensorImpl()->is_python_dispatch()) return false;
  if (t.layout() != at::kStrided || t.is_nested() || t.is_meta() || !t.has_storage()) return false;
  if (t.numel() == 0) return true;
  return at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.element_size(), t.storage_offset()) <=
         t.storage().nbytes();
}

bool lazy(const Tensor& t) { return t.is_neg() || t.is_conj() || t._is_zerotensor(); }

void check_memory(const Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.defined(), name, " must be a tensor, got none");
  if (in_memory(t) || t._is_zerotensor()) return;
  TORCH_CHECK_VALUE(t.layout() == at::kStrided && !t.is_nested(), name, " must be a dense (strided) tensor, got layout ",
                    t.layout());
  const bool subclass = t.unsafeGetTensorImpl()->is_python_dispatch();
  TORCH_CHECK_VALUE(false, name, " must lie in memory, got ", subclass ? "a tensor subclass" : "a tensor", ", sizes ",
                    t.sizes(), ", on ", t.device(),
                    subclass || t.is_meta() ? "" : ", whose storage was freed or is too small");
}

Tensor readable(const Tensor& t, const char* name) {
  check_memory(t, name);
  if (!lazy(t)) return t;
  return t._is_zerotensor() ? t.clone() : t.resolve_conj().resolve_neg();
}

}  // namespace peft_fused
