// __half as a storage type: conversion to and from float, rounding to nearest, ties to even.
#pragma once

#include "small_float.h"

using __half = cuda_on_cpu::SmallFloat<5, 10>;
