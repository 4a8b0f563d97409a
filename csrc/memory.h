// What has to be known of a tensor before its data pointer is read: that there is memory, and that it holds the values.
#pragma once
#include <ATen/core/Tensor.h>

namespace peft_fused {

// Whether all elements of a tensor lie in its storage: those of a meta tensor, or of a freed or cut storage, do not.
bool in_memory(const at::Tensor& t);

// Whether the values are others than those in memory: negated or conjugated by a bit, or zeros without any memory.
bool lazy(const at::Tensor& t);

// ValueError, naming the tensor, unless it is dense and lies in memory.
void check_memory(const at::Tensor& t, const char* name);

// The tensor, checked, with the values of a lazy one written out: what every data pointer is taken of.
at::Tensor readable(const at::Tensor& t, const char* name);

}  // namespace peft_fused
