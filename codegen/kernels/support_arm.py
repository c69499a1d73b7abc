"""64-bit integers on 32-bit ARM, as LLVM IR: the routines of its run-time ABI that divide and convert them.

Indices are int64, so kernels divide them; nearly all are below 2^32, for which one instruction does.
"""

from __future__ import annotations

# Quotient and remainder are returned in r0 to r3. A divisor of 0, which kernels rule out, gives anything, but
# ends. 64-bit division is shift and subtract, from the highest bit on that the quotient can have.
_DIVISION = """
define { i64, i64 } @__aeabi_uldivmod(i64 %n, i64 %d) {
  %either = or i64 %n, %d
  %high = lshr i64 %either, 32
  %short = icmp eq i64 %high, 0
  br i1 %short, label %narrow, label %wide
narrow:
  %n32 = trunc i64 %n to i32
  %d32 = trunc i64 %d to i32
  %q32 = udiv i32 %n32, %d32
  %back = mul i32 %q32, %d32
  %r32 = sub i32 %n32, %back
  %q0 = zext i32 %q32 to i64
  %r0 = zext i32 %r32 to i64
  br label %done
wide:
  %larger = icmp ugt i64 %d, %n
  %zero = icmp eq i64 %d, 0
  %none = or i1 %larger, %zero
  br i1 %none, label %done, label %long
long:
  %zn = call i64 @llvm.ctlz.i64(i64 %n, i1 false)
  %zd = call i64 @llvm.ctlz.i64(i64 %d, i1 false)
  %shift = sub i64 %zd, %zn
  %first = shl i64 %d, %shift
  br label %loop
loop:
  %i = phi i64 [ %shift, %long ], [ %i1, %loop ]
  %by = phi i64 [ %first, %long ], [ %by1, %loop ]
  %r = phi i64 [ %n, %long ], [ %r1, %loop ]
  %q = phi i64 [ 0, %long ], [ %q1, %loop ]
  %fits = icmp ule i64 %by, %r
  %taken = select i1 %fits, i64 %by, i64 0
  %r1 = sub i64 %r, %taken
  %bit = zext i1 %fits to i64
  %q2 = shl i64 %q, 1
  %q1 = or i64 %q2, %bit
  %by1 = lshr i64 %by, 1
  %i1 = sub i64 %i, 1
  %more = icmp sge i64 %i1, 0
  br i1 %more, label %loop, label %done
done:
  %qf = phi i64 [ %q0, %narrow ], [ 0, %wide ], [ %q1, %loop ]
  %rf = phi i64 [ %r0, %narrow ], [ %n, %wide ], [ %r1, %loop ]
  %out0 = insertvalue { i64, i64 } undef, i64 %qf, 0
  %out = insertvalue { i64, i64 } %out0, i64 %rf, 1
  ret { i64, i64 } %out
}
define { i64, i64 } @__aeabi_ldivmod(i64 %n, i64 %d) {
  %sn = ashr i64 %n, 63
  %sd = ashr i64 %d, 63
  %nx = xor i64 %n, %sn
  %dx = xor i64 %d, %sd
  %un = sub i64 %nx, %sn
  %ud = sub i64 %dx, %sd
  %both = call { i64, i64 } @__aeabi_uldivmod(i64 %un, i64 %ud)
  %uq = extractvalue { i64, i64 } %both, 0
  %ur = extractvalue { i64, i64 } %both, 1
  %sq = xor i64 %sn, %sd
  %qx = xor i64 %uq, %sq
  %rx = xor i64 %ur, %sn
  %q = sub i64 %qx, %sq
  %r = sub i64 %rx, %sn
  %out0 = insertvalue { i64, i64 } undef, i64 %q, 0
  %out = insertvalue { i64, i64 } %out0, i64 %r, 1
  ret { i64, i64 } %out
}
declare i64 @llvm.ctlz.i64(i64, i1)
"""

# The upper half of the number is exact as float64, so is 2^32 times it: the sum is rounded once. On the way
# to float32 what float64 has no bits for becomes one bit in its last place, below all that float32 keeps.
# Floating-point numbers are passed in core registers, whatever the target's own convention.
_CONVERSION = """
define arm_aapcscc double @__aeabi_{u}l2d(i64 %a) {{
  %high64 = lshr i64 %a, 32
  %high32 = trunc i64 %high64 to i32
  %low32 = trunc i64 %a to i32
  %high = {u_or_s}itofp i32 %high32 to double
  %low = uitofp i32 %low32 to double
  %scaled = fmul double %high, 4294967296.0
  %r = fadd double %scaled, %low
  ret double %r
}}
define arm_aapcscc float @__aeabi_{u}l2f(i64 %a) {{
  %limit = add i64 %a, {bias}
  %many = icmp ugt i64 %limit, {twice}
  %rest = and i64 %a, 2047
  %inexact = icmp ne i64 %rest, 0
  %bit = select i1 %inexact, i64 2048, i64 0
  %kept = and i64 %a, -2048
  %odd = or i64 %kept, %bit
  %exact = select i1 %many, i64 %odd, i64 %a
  %wide = call arm_aapcscc double @__aeabi_{u}l2d(i64 %exact)
  %r = fptrunc double %wide to float
  ret float %r
}}
define arm_aapcscc i64 @__aeabi_d2{u}lz(double %x) {{
  %a = {magnitude}
  %shifted = fmul double %a, 0x3DF0000000000000
  %high32 = call i32 @llvm.fptoui.sat.i32.f64(double %shifted)
  %high = uitofp i32 %high32 to double
  %scaled = fmul double %high, 4294967296.0
  %rest = fsub double %a, %scaled
  %low32 = call i32 @llvm.fptoui.sat.i32.f64(double %rest)
  %high64 = zext i32 %high32 to i64
  %top = shl i64 %high64, 32
  %low = zext i32 %low32 to i64
  %m = or i64 %top, %low
  %minus = sub i64 0, %m
  %negative = {negative}
  %r = select i1 %negative, i64 %minus, i64 %m
  ret i64 %r
}}
define arm_aapcscc i64 @__aeabi_f2{u}lz(float %x) {{
  %wide = fpext float %x to double
  %r = call arm_aapcscc i64 @__aeabi_d2{u}lz(double %wide)
  ret i64 %r
}}
"""
_SIGNED = _CONVERSION.format(
    u="",
    u_or_s="s",
    bias=1 << 53,  # -2^53 .. 2^53 becomes 0 .. 2^54
    twice=1 << 54,
    magnitude="call double @llvm.fabs.f64(double %x)",
    negative="fcmp olt double %x, 0.0",
)
_UNSIGNED = _CONVERSION.format(
    u="u", u_or_s="u", bias=0, twice=1 << 53, magnitude="fadd double %x, 0.0", negative="icmp eq i64 0, 1"
)
ARM_ROUTINES = f"{_DIVISION}{_SIGNED}{_UNSIGNED}declare i32 @llvm.fptoui.sat.i32.f64(double)\n"
