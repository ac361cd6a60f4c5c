// __nv_bfloat16 as a storage type: conversion to and from float, rounding to nearest, ties to even.
#pragma once

#include "small_float.h"

using __nv_bfloat16 = cuda_on_cpu::SmallFloat<8, 7>;
