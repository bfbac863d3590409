"""Vectors of LANES numbers in numba's compiled code, for loops that must not wait for a compiler to make vectors.

`load` and `gather` make one, operators, `min`, `max` and the functions below work lane by lane, `store` writes one. A
number stands for a vector that has it in all lanes. Elements are int32, uint32 (of which `>>` brings in zeros) or
float32; comparisons give masks, for `select` and `bits_of`. All is plain LLVM, which any processor runs to the same
bits; nothing is fused. Places in arrays are not looked at.
"""

from __future__ import annotations

import operator

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models, register_default
from numba.core.imputils import lower_builtin, lower_cast
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic

__all__ = [
    "LANES",
    "as_floats",
    "as_integers",
    "as_unsigned",
    "bits_of",
    "gather",
    "lane_numbers",
    "leading_zeros",
    "load",
    "magnitude",
    "number_of_bits",
    "select",
    "splat",
    "store",
    "total",
]

LANES = 8  # a part of klt's format
_I32 = ir.IntType(32)


class Vector(types.Type):
    """LANES numbers of one type, in a register."""

    def __init__(self, element: types.Type) -> None:
        self.element = element
        super().__init__(name=f"Vector({element})")


INTEGERS, UNSIGNED, FLOATS, MASK = (Vector(t) for t in (types.int32, types.uint32, types.float32, types.boolean))


@register_default(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _llvm(kind))


def _llvm(kind):
    element = {types.float32: ir.FloatType(), types.boolean: ir.IntType(1)}.get(kind.element, _I32)
    return ir.VectorType(element, LANES)


def _broadcast(builder, value):
    undefined = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, LANES), None))


@lower_cast(types.Number, Vector)
def _cast_number(context, builder, from_type, to_type, value):
    return _broadcast(builder, context.cast(builder, value, from_type, to_type.element))


def _build(name, builder, kind, left, right):
    """`left` operator `right`, both of `kind`."""
    if name in _COMPARISONS:
        if kind == FLOATS:
            return builder.fcmp_ordered(_COMPARISONS[name], left, right)
        compare = builder.icmp_unsigned if kind == UNSIGNED else builder.icmp_signed
        return compare(_COMPARISONS[name], left, right)
    if name in ("min", "max"):
        return builder.select(_build({"min": "lt", "max": "gt"}[name], builder, kind, left, right), left, right)
    if name == "rshift":
        return builder.lshr(left, right) if kind == UNSIGNED else builder.ashr(left, right)
    floats = {"add": builder.fadd, "sub": builder.fsub, "mul": builder.fmul, "truediv": builder.fdiv}
    integers = {"add": builder.add, "sub": builder.sub, "mul": builder.mul, "lshift": builder.shl}
    integers |= {"and_": builder.and_, "or_": builder.or_, "xor": builder.xor}
    return (floats if kind == FLOATS else integers)[name](left, right)


_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "=="}


def _define(function):
    name = function.__name__

    @infer_global(function)
    class _Typing(AbstractTemplate):
        def generic(self, arguments, keywords):
            kinds = {a for a in arguments if isinstance(a, Vector)}
            if len(kinds) != 1 or not all(isinstance(a, (Vector, types.Number)) for a in arguments):
                return None
            kind = kinds.pop()
            return signature(MASK if name in _COMPARISONS else kind, kind, kind)

    @lower_builtin(function, Vector, Vector)
    def _lowering(context, builder, sig, arguments):
        return _build(name, builder, sig.args[0], *arguments)


for _function in (
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.lshift, operator.rshift),
    *(operator.and_, operator.or_, operator.xor),
    *(operator.lt, operator.le, operator.gt, operator.ge, operator.eq),
    *(min, max),
):
    _define(_function)


def _address(context, builder, kind, array, index, index_type):
    """To elements of a contiguous array: of one place, or of a place in each lane."""
    data = context.make_array(kind)(context, builder, array).data
    element = context.get_data_type(kind.dtype)
    if isinstance(index_type, Vector):
        if index_type == UNSIGNED:
            index = builder.zext(index, ir.VectorType(ir.IntType(64), LANES))
        bytes_pointer = ir.IntType(8).as_pointer()  # one type of all: a module declares `gather`'s intrinsic once
        addresses = builder.gep(builder.bitcast(data, bytes_pointer), [index], source_etype=element)
        addresses.type = ir.VectorType(bytes_pointer, LANES)
        return addresses
    index = context.cast(builder, index, index_type, types.intp)
    return builder.gep(data, [index], source_etype=element)


def _kind_of(array):
    """Of what is loaded: narrow integers are widened."""
    return {types.float32: FLOATS, types.uint32: UNSIGNED}.get(array.dtype, INTEGERS)


@intrinsic
def load(typing_context, array, begin):
    """Elements [begin, begin + LANES) of a contiguous array; of uint8 and uint16 as int32."""

    def codegen(context, builder, signature, args):
        stored = ir.VectorType(context.get_data_type(array.dtype), LANES)
        address = _address(context, builder, array, args[0], args[1], begin)
        values = builder.load(builder.bitcast(address, stored.as_pointer()), align=array.dtype.bitwidth // 8)
        return values if array.dtype.bitwidth == 32 else builder.zext(values, _llvm(INTEGERS))

    return _kind_of(array)(array, begin), codegen


@intrinsic
def store(typing_context, array, begin, values):
    """Write elements [begin, begin + LANES) of a contiguous array; into uint8 and uint16 the lower bits."""

    def codegen(context, builder, signature, args):
        stored = ir.VectorType(context.get_data_type(array.dtype), LANES)
        value = args[2] if array.dtype.bitwidth == 32 else builder.trunc(args[2], stored)
        address = _address(context, builder, array, args[0], args[1], begin)
        builder.store(value, builder.bitcast(address, stored.as_pointer()), align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(array, begin, values), codegen


@intrinsic
def gather(typing_context, array, indices):
    """Elements of a contiguous array in the places `indices`. Reads 4 bytes each: of uint8 and uint16, what stands
    behind the last must be there, too."""

    def codegen(context, builder, signature, args):
        vector = _llvm(signature.return_type)
        addresses = _address(context, builder, array, args[0], args[1], indices)
        mask = ir.Constant(_llvm(MASK), [1] * LANES)
        kind = ir.FunctionType(vector, [addresses.type, _I32, mask.type, vector])
        name = "f32" if signature.return_type == FLOATS else "i32"
        take = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.gather.v{LANES}{name}.v{LANES}p0")
        align = ir.Constant(_I32, array.dtype.bitwidth // 8)
        values = builder.call(take, [addresses, align, mask, ir.Constant(vector, ir.Undefined)])
        if array.dtype.bitwidth == 32:
            return values
        return builder.and_(values, ir.Constant(vector, [(1 << array.dtype.bitwidth) - 1] * LANES))

    return _kind_of(array)(array, indices), codegen


@intrinsic
def splat(typing_context, value):
    """A vector with `value` in all lanes; of a float as float32, of an integer as int32."""
    kind = FLOATS if isinstance(value, types.Float) else INTEGERS

    def codegen(context, builder, signature, args):
        return context.cast(builder, args[0], value, kind)

    return kind(value), codegen


@intrinsic
def lane_numbers(typing_context):
    """0, 1, 2, ..."""

    def codegen(context, builder, signature, args):
        return ir.Constant(_llvm(INTEGERS), list(range(LANES)))

    return INTEGERS(), codegen


@intrinsic
def select(typing_context, mask, if_true, if_false):
    """Lanes of `if_true` where the mask says so, else of `if_false`; either may be a number."""
    kind = if_true if isinstance(if_true, Vector) else if_false

    def codegen(context, builder, signature, args):
        return builder.select(*args)

    return kind(MASK, kind, kind), codegen


@intrinsic
def magnitude(typing_context, values):
    """Without signs."""

    def codegen(context, builder, signature, args):
        integers = builder.bitcast(args[0], _llvm(INTEGERS))
        if values == FLOATS:
            mask = ir.Constant(integers.type, [0x7FFFFFFF] * LANES)
            return builder.bitcast(builder.and_(integers, mask), args[0].type)
        negative = builder.sub(ir.Constant(integers.type, None), integers)
        return builder.select(builder.icmp_signed("<", integers, negative), negative, integers)

    return values(values), codegen


def _converted(to_kind, convert):
    @intrinsic
    def conversion(typing_context, values):
        def codegen(context, builder, signature, args):
            return convert(builder, values, args[0])

        return to_kind(values), codegen

    return conversion


def _to_integers(builder, kind, value):
    if kind == MASK:
        return builder.zext(value, _llvm(INTEGERS))
    return builder.fptosi(value, _llvm(INTEGERS)) if kind == FLOATS else value


def _to_floats(builder, kind, value):
    return (builder.uitofp if kind == UNSIGNED else builder.sitofp)(value, _llvm(FLOATS))


as_integers = _converted(INTEGERS, _to_integers)  # floats, which must be in range, towards 0; masks as 0 and 1
as_unsigned = _converted(UNSIGNED, lambda builder, kind, value: value)
as_floats = _converted(FLOATS, _to_floats)


@intrinsic
def total(typing_context, values):
    """The sum of int32 lanes, int32."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(_I32, [args[0].type])
        name = f"llvm.vector.reduce.add.v{LANES}i32"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)

    return types.int32(INTEGERS), codegen


@intrinsic
def bits_of(typing_context, mask):
    """An int64 of which bit i is that of lane i."""

    def codegen(context, builder, signature, args):
        return builder.zext(builder.bitcast(args[0], ir.IntType(LANES)), ir.IntType(64))

    return types.int64(MASK), codegen


@intrinsic
def leading_zeros(typing_context, value):
    """Of the 64 bits of a positive int64."""

    def codegen(context, builder, signature, args):
        return builder.ctlz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), codegen


@intrinsic
def number_of_bits(typing_context, value):
    """That are set in an int64."""

    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.int64(types.int64), codegen
