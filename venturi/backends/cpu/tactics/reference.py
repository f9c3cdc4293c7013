"""The last tactic of every Region: its meaning, run by the operator table."""

from __future__ import annotations

from venturi.backends.base import Arguments, Config, Kernel, RegionView
from venturi.backends.reference.program import Program, node_function
from venturi.ir.build import subgraphs
from venturi.ir.region import body_of, is_region
from venturi.ops.table import VIEW, find_op


class Reference:
    name = "reference"

    def match(self, region: RegionView) -> list[Config] | str:
        return [{}]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        if is_region(region.node):
            program, fill = Program(body_of(region.node), region.weights), Arguments(region)
            single = len(region.outputs) == 1
            if single:
                return Kernel(lambda *args: program.run(fill(args))[0])
            return Kernel(lambda *args: tuple(program.run(fill(args))))
        fn = node_function(region.node, region.weights)
        if all(v is not None and region.constant(v) is None for v in region.formal):
            return Kernel(fn)
        if subgraphs(region.node):
            count, fill = len(region.dynamic), Arguments(region)
            return Kernel(lambda *args: fn(*fill(args[:count]), *args[count:]))
        template = [region.constant(v) for v in region.formal]
        holes = [i for i, v in enumerate(region.formal) if v is not None and template[i] is None]
        if holes == [0]:
            rest = tuple(template[1:])
            return Kernel(lambda x: fn(x, *rest))

        def run(*args: object) -> object:
            inputs = list(template)
            for hole, arg in zip(holes, args):
                inputs[hole] = arg
            return fn(*inputs)

        return Kernel(run)


def is_view(region: RegionView) -> bool:
    op = find_op(region.node.domain, region.node.op_type)
    return op is not None and VIEW in op.traits
