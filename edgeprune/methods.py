"""Methods: named combinations of a criterion, an allocator, a schedule and a recovery. Imports nothing heavy.

Every method gets the same measured latency table, the same calibration images, budget and contract; only its four parts
differ, and for those that drop tokens what they choose and which tokens stay. `METHODS` is the list; the parts explain
themselves in their files.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeprune import modules
from edgeprune.errors import unknown

DEFAULT = "edgeprune"


@dataclass(frozen=True)
class Method:
    """Four parts and what they are together, and for those that drop tokens how."""

    name: str
    kind: str  # which of the parts carries the method's own idea; "method" where it takes several
    criterion: str
    allocator: str
    schedule: str
    recovery: str
    about: str  # the paper, and what of it is left out
    dims: str = ""  # what it chooses, as after --dims; "" = all that the allocator knows
    reducer: str = "cls"  # `types.REDUCER`, which would bring numpy to `edgeprune methods`

    @property
    def parts(self) -> dict[str, str]:
        return {kind: getattr(self, kind) for kind in modules.KINDS}


METHODS = (
    Method("edgeprune", "method", "fisher", "search", "one-shot", "refit", "the default"),
    Method("knapsack", "allocator", "fisher", "knapsack", "one-shot", "refit", "the default without its search: seconds instead of a minute"),
    Method("kl", "criterion", "kl", "search", "one-shot", "refit", "the default with divergences measured one by one"),
    Method("ziplm", "method", "ziplm", "spdy", "one-shot", "obs", "ZipLM (arXiv 2302.04089)"),
    Method("nvit", "method", "nvit", "nvit", "gradual", "none", "NViT (arXiv 2110.04869); residual and query widths stay"),
    Method("p3b", "method", "p3b", "p3b", "p3b", "none", "Pruning by Block Benefit (arXiv 2506.23675)"),
    Method("sls", "allocator", "magnitude", "sls", "one-shot", "none", "SLS (arXiv 2407.14330): layers from the end; add --recovery lora"),
    Method("hessian", "criterion", "hessian", "ranking", "one-shot", "none", "grouped Fisher (DepGraph, arXiv 2301.12900)"),
    Method("taylor", "criterion", "taylor", "ranking", "one-shot", "none", "grouped Taylor (arXiv 1906.10771, 2301.12900)"),
    Method("l1", "criterion", "l1", "ranking", "one-shot", "none", "grouped L1 norm (arXiv 2301.12900)"),
    Method("l2", "criterion", "l2", "uniform", "one-shot", "none", "grouped L2 norm (arXiv 2301.12900), the same share everywhere"),
    Method("random", "allocator", "random", "erk", "one-shot", "none", "random units, ERK widths (arXiv 2202.02643); the control"),
    Method("global-magnitude", "allocator", "l2", "ranking", "one-shot", "none", "global magnitude pruning with floors (arXiv 2209.14624)"),
    Method("flap", "method", "flap", "unit-ranking", "one-shot", "bias", "FLAP (arXiv 2312.11983)"),
    Method("wanda", "criterion", "wanda", "uniform", "one-shot", "none", "Wanda-sp (arXiv 2306.11695, 2312.11983)"),
    Method("cfsp", "method", "cfsp", "cfsp", "one-shot", "lora", "CFSP (arXiv 2409.13199); one rank for all layers"),
    Method("vbp", "criterion", "vbp", "unit-ranking", "one-shot", "bias", "Variance-based pruning (arXiv 2507.12988), heads too"),
    Method("halp", "method", "taylor", "knapsack", "gradual", "none", "HALP (arXiv 2110.10811): its knapsack, solved exactly"),
    Method("latency-greedy", "allocator", "taylor", "latency-ranking", "one-shot", "none", "after HALP: least importance per millisecond first"),
    Method("gradual", "schedule", "l2", "ranking", "gradual", "none", "To prune or not to prune (arXiv 1710.01878)"),
    Method("granet", "schedule", "l2", "ranking", "granet", "none", "GraNet (arXiv 2106.10404): regrowth by gradient"),
    Method("pdp", "schedule", "l2", "ranking", "pdp", "none", "PDP (arXiv 2305.11203): soft masks without parameters"),
    Method("hesso", "schedule", "hesso", "unit-ranking", "hesso", "none", "HESSO (arXiv 2409.09085): doomed units decay to zero"),
    Method("hesso-cric", "schedule", "hesso", "unit-ranking", "hesso-cric", "none", "HESSO with CRIC (arXiv 2409.09085)"),
    Method("mask-sparsity", "schedule", "l2", "ranking", "mask-sparsity", "none", "MaskSparsity (arXiv 2201.06776): a penalty on doomed units only"),
    Method("lapp", "allocator", "magnitude", "lapp", "one-shot", "none", "LAPP (arXiv 2309.14157): learnt thresholds; no bypass"),
    Method("loraprune", "criterion", "loraprune", "uniform", "gradual", "lora", "LoRAPrune (arXiv 2305.18403); weights too are trained while units go"),
    Method("llm-pruner", "method", "taylor", "uniform", "one-shot", "lora", "LLM-Pruner (arXiv 2305.11627)"),
    Method("pat", "schedule", "taylor", "ranking", "pat", "lora", "PAT (arXiv 2408.14721): heads and neurons for hidden widths"),
    Method("compresso", "schedule", "taylor", "ranking", "compresso", "none", "Compresso (arXiv 2310.05015): L0 gates on latency; no prompts"),
    Method("lrp", "criterion", "lrp", "unit-ranking", "one-shot", "none", "Pruning by Explaining (arXiv 1912.08881)"),
    Method("beta-rank", "criterion", "beta-rank", "uniform", "one-shot", "none", "Beta-Rank (arXiv 2304.07461), classes counting alike"),
    Method("pq", "allocator", "l2", "pq", "one-shot", "none", "PQ index (arXiv 2302.05601): how compressible each layer is"),
    Method("d-pruner", "criterion", "d-pruner", "ranking", "one-shot", "none", "D-Pruner (arXiv 2405.06275): general and target importance"),
    Method("udfc", "recovery", "l2", "uniform", "one-shot", "udfc", "UDFC (arXiv 2308.07209): without data; no quantisation"),
    Method("tas", "allocator", "magnitude", "tas", "one-shot", "none", "Transformable architecture search (arXiv 1905.09717)"),
    Method("rethinking", "recovery", "fisher", "search", "one-shot", "scratch", "Rethinking pruning (arXiv 1810.05270): the shape from scratch"),
    Method("precropping", "allocator", "random", "erk", "one-shot", "scratch", "PreCropping: widths chosen without weights, from scratch"),
    Method("ast", "schedule", "l2", "ranking", "ast", "none", "AST (arXiv 2407.20584): masks under distillation; no 2:4"),
    Method("fmp", "criterion", "fmp", "uniform", "one-shot", "none", "FMP (arXiv 2307.11565): a screen for backdoors"),
    Method("cls-attention", "reducer", "fisher", "search", "one-shot", "refit", "EViT (arXiv 2202.07800): tokens alone go", "tokens", "evit"),
    Method("zero-tprune", "reducer", "fisher", "search", "one-shot", "refit", "Zero-TPrune (arXiv 2305.17328): tokens alone go", "tokens", "zero-tprune"),
    Method("tome", "reducer", "fisher", "search", "one-shot", "refit", "ToMe (arXiv 2210.09461): tokens alone are merged", "tokens", "tome"),
)  # fmt: skip

#: What is not here, and what of it is: ideas that static graphs on a CPU cannot run, or of another domain.
ABSENT = {
    "fwtw": "picks the weights of each image at run time: a static graph cannot; its mean widths are what `p3b` and `search` find",
    "dtop": "lets easy tokens of an image exit early: shapes would depend on data; a fixed quota of tokens survives",
    "adawpt": "prunes windows per image for deblurring: shapes would depend on data; a fixed quota survives",
    "fastervlm": "drops visual tokens before a language model, which is not there; its class-token score survives",
    "aptp": "routes each prompt of a diffusion model to a sub-network; a family of artifacts (`--latency` repeated) survives",
    "ld-pruner": "scores operators of a diffusion U-Net by their latents; scoring by what the output changes is `kl`",
    "sd2-study": "prunes Stable Diffusion 2: another domain; magnitude, which it favours, is `global-magnitude`",
    "fedtiny": "chooses masks across federated clients, by batch norms that a ViT has not; regrowth by gradient is `granet`",
    "hollownerf": "prunes the hash grid of a radiance field: another domain, nothing survives",
    "mesh-refinement": "prunes faces of meshes: another domain, nothing survives",
    "provence": "prunes passages of retrieved text: another domain, nothing survives",
}


def get(name: str) -> Method:
    """The method; UsageError with "did you mean" for an unknown name."""
    found = {method.name: method for method in METHODS}
    if name not in found:
        raise unknown("method", name, found)
    return found[name]


def listing() -> str:
    """What `edgeprune methods` prints: methods, the parts of every kind, and what is not here."""
    columns = "{:17} {:10} {:11} {:16} {:14} {:9} {}"
    lines = ["methods (--method NAME), all ready: which part carries the idea, and the four parts", ""]
    lines.append(columns.format("method", "kind", "criterion", "allocator", "schedule", "recovery", "about"))
    for m in METHODS:
        about = f"{m.about} (--dims {m.dims} --reducer {m.reducer})" if m.dims else m.about
        lines.append(columns.format(m.name, m.kind, m.criterion, m.allocator, m.schedule, m.recovery, about))
    for kind in modules.PACKAGES:
        lines += ["", f"{kind} (--{kind} NAME)"]
        lines += [f"  {name:15} {modules.summary(kind, name)}" for name in modules.names(kind)]
    lines += ["", "not here, and why"] + [f"  {name:15} {why}" for name, why in ABSENT.items()]
    return "\n".join(lines)


def describe(name: str) -> str:
    """All about one method or part: what it is made of, looks at and costs. Raises UsageError for an unknown name."""
    methods = {method.name: method for method in METHODS}
    parts = [(kind, name) for kind in modules.PACKAGES if name in modules.names(kind)]
    if name not in methods and not parts:
        if name in ABSENT:
            return f"{name}: {ABSENT[name]}"
        everything = {*methods, *ABSENT, *(part for kind in modules.PACKAGES for part in modules.names(kind))}
        raise unknown("method", name, everything)
    lines = []
    if name in methods:
        method = methods[name]
        lines.append(f"method {name}: {method.about}")
        if method.dims:
            lines.append(f"chooses {method.dims}; which of them stay is for the reducer {method.reducer}")
        parts = [*method.parts.items(), *(part for part in parts if part not in method.parts.items())]
    for kind, part in parts:
        looks = ", ".join(modules.needs(kind, part)) or "nothing"
        lines += ["", f"{kind} {part} (looks at {looks})"]
        lines += [f"  {line}".rstrip() for line in modules.doc(kind, part).split("\n")]
    return "\n".join(lines).strip()
