"""Reads the operations of a pickle as data, instead of an unpickler, which would run them."""

from __future__ import annotations

import io
import pickletools
from typing import Any

from fgvczoo.checkpoints.description import Box, Dict, Name, Storage, build, extend, persistent, set_item
from fgvczoo.checkpoints.refused import Refused

# One operation costs about two microseconds and at most a few hundred bytes.
_MAX_OPERATIONS = 2_000_000
# Operations that push their argument.
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def described(stream: io.BytesIO, storages: dict[str, Storage]) -> Any:
    """The value that the next pickle of a stream describes, as plain values, `Box`, `Name`, `Storage` and `View`;
    adds what storages it names to `storages`."""
    length = len(stream.getbuffer())
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop() -> Any:
        if marks and len(stack) <= marks[-1]:
            raise ValueError("its pickle takes more than it gave")
        return stack.pop()

    def pop_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    def remember(index: int) -> None:
        if not 0 <= index <= length:
            raise Refused(f"its pickle asks for {index:,} places of memory")
        memo[index] = stack[-1]

    argument: Any
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if number > _MAX_OPERATIONS:
            raise Refused(f"its pickle has more than {_MAX_OPERATIONS:,} operations")
        match opcode.name:
            case name if name in _LITERALS:
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return pop()
            case "MARK":
                marks.append(len(stack))
            case "POP":
                # As unpicklers have it: on a mark, it takes the mark.
                if marks and len(stack) == marks[-1]:
                    marks.pop()
                else:
                    pop()
            case "POP_MARK":
                pop_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                remember(argument)
            case "MEMOIZE":
                remember(len(memo))
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack.append(tuple(reversed([pop() for _ in range(_TUPLES[name])])))
            case "TUPLE":
                stack.append(tuple(pop_mark()))
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "LIST" | "FROZENSET":
                stack.append(pop_mark())
            case "APPEND":
                value = pop()
                extend(stack[-1], [value])
            case "APPENDS" | "ADDITEMS":
                values = pop_mark()
                extend(stack[-1], values)
            case "EMPTY_DICT":
                stack.append(Dict())
            case "DICT":
                values = pop_mark()
                stack.append(Dict())
                for key, value in zip(values[::2], values[1::2]):
                    set_item(stack[-1], key, value)
            case "SETITEM":
                value, key = pop(), pop()
                set_item(stack[-1], key, value)
            case "SETITEMS":
                values = pop_mark()
                for key, value in zip(values[::2], values[1::2]):
                    set_item(stack[-1], key, value)
            case "GLOBAL":
                module, _, attribute = argument.partition(" ")
                stack.append(Name(module, attribute))
            case "STACK_GLOBAL":
                attribute, module = pop(), pop()
                if not isinstance(module, str) or not isinstance(attribute, str):
                    raise ValueError("its pickle names something by no string")
                stack.append(Name(module, attribute))
            case "REDUCE" | "NEWOBJ":
                arguments = pop()
                stack.append(build(pop(), arguments))
            case "NEWOBJ_EX":
                _, arguments = pop(), pop()
                stack.append(build(pop(), arguments))
            case "INST" | "OBJ":
                pop_mark()
                stack.append(Box())
            case "BUILD":
                state = pop()
                if isinstance(stack[-1], Box):
                    stack[-1].state = state
            case "PERSID" | "BINPERSID" as name:
                stack.append(persistent(pop() if name == "BINPERSID" else argument, storages))
            case name:
                raise Refused(f"its pickle uses {name}, which no checkpoint needs")
    raise ValueError("its pickle has no end")
