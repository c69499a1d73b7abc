"""Rounding to integers for processors without the instructions, as LLVM IR.

Written with arithmetic that these processors have. A routine must not contain what LLVM would make a call of
it from.
"""

from __future__ import annotations

# Adding and taking away 2^(bits of the mantissa) rounds what is smaller to the nearest integer, ties to even.
_ROUNDING = """
define {type} @nearbyint{suffix}({type} %x) {{
  %a = call {type} @llvm.fabs.{llvm}({type} %x)
  %up = fadd {type} %a, {limit}
  %down = fsub {type} %up, {limit}
  %signed = call {type} @llvm.copysign.{llvm}({type} %down, {type} %x)
  %small = fcmp olt {type} %a, {limit}
  %r = select i1 %small, {type} %signed, {type} %x
  ret {type} %r
}}
define {type} @trunc{suffix}({type} %x) {{
  %n = call {type} @nearbyint{suffix}({type} %x)
  %a = call {type} @llvm.fabs.{llvm}({type} %x)
  %m = call {type} @llvm.fabs.{llvm}({type} %n)
  %above = fcmp ogt {type} %m, %a
  %less = fsub {type} %m, 1.0
  %t = select i1 %above, {type} %less, {type} %m
  %r = call {type} @llvm.copysign.{llvm}({type} %t, {type} %x)
  ret {type} %r
}}
define {type} @floor{suffix}({type} %x) {{
  %n = call {type} @nearbyint{suffix}({type} %x)
  %above = fcmp ogt {type} %n, %x
  %less = fsub {type} %n, 1.0
  %r = select i1 %above, {type} %less, {type} %n
  ret {type} %r
}}
define {type} @ceil{suffix}({type} %x) {{
  %n = call {type} @nearbyint{suffix}({type} %x)
  %below = fcmp olt {type} %n, %x
  %more = fadd {type} %n, 1.0
  %s = call {type} @llvm.copysign.{llvm}({type} %more, {type} %x)
  %r = select i1 %below, {type} %s, {type} %n
  ret {type} %r
}}
declare {type} @llvm.fabs.{llvm}({type})
declare {type} @llvm.copysign.{llvm}({type}, {type})
"""
ROUNDING_ROUTINES = _ROUNDING.format(
    type="float", llvm="f32", suffix="f", limit="8388608.0"
) + _ROUNDING.format(type="double", llvm="f64", suffix="", limit="4503599627370496.0")
