"""A case that fails, cut down to what it needs for that."""

from __future__ import annotations

from fuzz.cases import Case
from fuzz.run import Call, Verdict, judge


def shrink(case: Case, call: Call, verdict: Verdict, tries: int = 150) -> Case:
    """The smallest case that can be found which fails in the same manner."""
    smaller = case.smaller()
    while tries and (next_one := next(smaller, None)) is not None:
        tries -= 1
        if judge(next_one, call).kind == verdict.kind:
            case, smaller = next_one, next_one.smaller()
    return case


_SCRIPT = """# {kind}: {words}
{source}
import pcr_fx

model, given = Model().to(torch.{dtype}), inputs(torch.{dtype})
fast = {fast}
results = []
for run in (model, fast):
    x, xs = (tensor.detach().requires_grad_() for tensor in given)
    torch.manual_seed(0)
    outputs = run(x, xs)
    loss = sum((o * torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outputs)
    results.append([*outputs, *torch.autograd.grad(loss, [x, xs, *model.parameters()], allow_unused=True, materialize_grads=True)])
for ours, theirs in zip(results[1], results[0]):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
"""


def script(case: Case, call: Call, verdict: Verdict) -> str:
    """What fails, as a script that runs by itself; kernels are those of the interpreter or of the compiler alike."""
    options = call.options
    fast = {
        "transform": f"pcr_fx.transform(model, given, options={options})",
        "compile": f"torch.compile(model, backend='deeppcr', options={ {**options, 'inner_backend': 'eager'} })",
        "solve_chain": f"pcr_fx.transform(model, given, options={options})  # found by solve_chain(step, ...)",
    }[call.way_in]
    words = f"{verdict.words} ({call}, seed {case.seed})"
    return _SCRIPT.format(kind=verdict.kind, words=words, source=case.source().strip(), dtype=case.dtype, fast=fast)
