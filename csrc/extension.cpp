// The extension as one translation unit: the compiler takes longer to read torch's headers than for all of ours.
#include "autograd/bottleneck.cpp"
#include "autograd/common.cpp"
#include "autograd/lowrank.cpp"
#include "autograd/structured.cpp"
#include "bindings.cpp"
#include "dropout.cpp"
#include "memory.cpp"
