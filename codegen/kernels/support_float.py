"""Floating-point routines for processors without the instructions, as LLVM IR: rounding to integers, float16.

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

# Called with float16 in a floating-point register. TVM has routines of these names in every object, weak, and
# called with integers.
HALF_ROUTINES = """
define float @__extendhfsf2(half %h) {
  %bits = bitcast half %h to i16
  %wide = zext i16 %bits to i32
  %magnitude = and i32 %wide, 32767
  %moved = shl i32 %magnitude, 13
  %tiny = bitcast i32 %moved to float
  %number = fmul float %tiny, 0x46F0000000000000
  %finite = bitcast float %number to i32
  %special = or i32 %moved, 2139095040
  %is_special = icmp uge i32 %magnitude, 31744
  %any = select i1 %is_special, i32 %special, i32 %finite
  %negative = and i32 %wide, 32768
  %sign = shl i32 %negative, 16
  %out = or i32 %any, %sign
  %r = bitcast i32 %out to float
  ret float %r
}
define half @__truncsfhf2(float %x) {
  %bits = bitcast float %x to i32
  %a = and i32 %bits, 2147483647
  ; 65536 and up, infinity, NaN
  %is_nan = icmp ugt i32 %a, 2139095040
  %special = select i1 %is_nan, i32 32256, i32 31744
  %is_special = icmp uge i32 %a, 1199570944
  ; subnormal: the sum with 1/2 is rounded to 2^-24, the unit of float16
  %magnitude = bitcast i32 %a to float
  %sum = fadd float %magnitude, 0.5
  %sum_bits = bitcast float %sum to i32
  %subnormal = sub i32 %sum_bits, 1056964608
  %is_subnormal = icmp ult i32 %a, 947912704
  ; normal: ties to even, a carry goes to the exponent
  %last = lshr i32 %a, 13
  %odd = and i32 %last, 1
  %half_less = add i32 %a, 4095
  %rounded = add i32 %half_less, %odd
  %rebased = sub i32 %rounded, 939524096
  %normal = lshr i32 %rebased, 13
  %finite = select i1 %is_subnormal, i32 %subnormal, i32 %normal
  %number = select i1 %is_special, i32 %special, i32 %finite
  %top = lshr i32 %bits, 16
  %sign = and i32 %top, 32768
  %out = or i32 %number, %sign
  %narrow = trunc i32 %out to i16
  %r = bitcast i16 %narrow to half
  ret half %r
}
"""
