"""Memory, time, cost and a layout of a run on GPUs, by arithmetic from the configurations of its models.

No weights are read. Every number has its formula; the shares of a card's peak that real programs reach are assumptions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from understudy.errors import RecipeError, nearest
from understudy.format import number
from understudy.lazy import torch
from understudy.linear.chunked import chunk_elements
from understudy.models import apply_lora, config_on_disk, vocabulary_size
from understudy.models.files import locate, said_by
from understudy.recipe.checks.room import BYTES, Item, Needs, Size, amount, memory_items, peak, size_of
from understudy.recipe.schema import Lora, Recipe
from understudy.recipe.tokenizers import Tokenizers
from understudy.trainer.console import Console


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU by its data sheet: without sparsity, links in one direction."""

    memory: float
    """GB (1e9 bytes)."""
    flops: float
    """Operations a second in bfloat16."""
    bandwidth: float
    """Bytes a second from its memory."""
    link: float
    """Bytes a second to a GPU of the same machine."""


CARDS: Mapping[str, Card] = {
    "a100": Card(memory=80, flops=312e12, bandwidth=2.04e12, link=300e9),
    "h100": Card(memory=80, flops=989e12, bandwidth=3.35e12, link=450e9),
    "h200": Card(memory=141, flops=989e12, bandwidth=4.8e12, link=450e9),
    "b200": Card(memory=180, flops=2250e12, bandwidth=7.7e12, link=900e9),
    "l40s": Card(memory=48, flops=362e12, bandwidth=0.864e12, link=32e9),
}
"""NVIDIA's data sheets: A100 80 GB, H100, H200 and B200 as SXM, L40S over PCIe 4."""
PASSES_SHARE, DECODE_SHARE = 0.4, 0.6
"""Shares that are reached of the peak by passes over whole samples, and of the memory's bandwidth by writing token by token."""
USABLE = 0.9
"""Share of a card's memory that is planned with: the rest goes to the driver, kernels and fragmentation."""
WHEN: Mapping[str, str] = {"held": "always", "update": "in the update", "generate": "while writing"}
GPUS_A_MACHINE = 8
NETWORK = 50e9
"""Bytes a second between machines to each GPU: 400 Gb/s."""
HF_LAYER_S = 0.8e-3
"""Seconds that transformers takes for a layer and token at the least, whatever its size: kernels are started one by one."""
SERVER_ROWS = 256
"""The most samples that one server writes at a time, where its memory has room for more."""


@dataclass(frozen=True)
class Shape:
    """A model by its configuration: bytes, and the arithmetic of one token."""

    size: Size
    parameters: int
    active: int
    """Parameters that a token is multiplied with: without the embedding, of experts those that it is sent to."""
    width: int
    """Heads times the size of a head."""
    head: int
    """Parameters of the output layer."""
    block: int
    """Parameters of the largest of the layers."""
    outside: int
    """Parameters in no layer: embedding, output layer, the last norm."""

    def forward(self, tokens: float, length: float) -> float:
        """As `operations`."""
        return operations(self.active, self.size.layers, self.width, tokens, length)


def operations(active: float, layers: int, width: int, tokens: float, length: float) -> float:
    """Operations of a pass over samples of this length: 2 a parameter and token, and in each layer 4 x width for every token
    before it."""
    return tokens * (2 * active + 4 * layers * width * length / 2)


def read_shape(source: str | None, build: Mapping[str, Any] | None, dtype: str, lora: Any = None) -> Shape:
    """The shape of a model in a directory, at the hub or of `build`. Raises RecipeError where it has no configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config_on_disk(source, build)
    name, offline = (source, None) if config is not None or source is None else locate(source)
    try:
        if config is None:
            config = AutoConfig.from_pretrained(
                name, trust_remote_code=False, local_files_only=offline is not None
            ).get_text_config()
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
            if lora is not None:
                model = apply_lora(
                    model, rank=lora.rank, alpha=lora.alpha, target_modules=lora.target_modules or "all-linear"
                )
    except RecipeError:
        raise
    except Exception as error:
        # each configuration fails in its own way
        raise RecipeError(
            f"the configuration of {source or build} cannot be read: {said_by(error, offline)}; give a directory with its "
            "config.json"
        ) from error
    routed = next(
        (
            getattr(config, key)
            for key in ("num_experts", "num_local_experts", "n_routed_experts")
            if hasattr(config, key)
        ),
        None,
    )
    sent = getattr(config, "num_experts_per_tok", routed) / routed if routed else 1.0
    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    counts = {name: value.numel() for name, value in model.named_parameters()}
    active = sum(count * (sent if ".experts." in name else 1) for name, count in counts.items())
    # the table is looked up; a tied one is multiplied with as the output layer
    active -= 0 if head is embedding else embedding.numel()
    layers: dict[str, int] = {}
    for name, count in counts.items():
        place = name.split(".layers.")
        if len(place) > 1:
            layers[place[1].split(".")[0]] = layers.get(place[1].split(".")[0], 0) + count
    heads = int(getattr(config, "num_attention_heads", 1))
    width = heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    whole, block = sum(counts.values()), max(layers.values(), default=0)
    return Shape(size_of(model), whole, int(active), width, head.numel(), block, whole - sum(layers.values()))


def shapes_of(recipe: Recipe) -> dict[str, Shape]:
    """Those of the student and of every teacher and reference whose model the recipe names, by their places."""
    student = recipe.student
    dtype = "bfloat16" if student.dtype == "auto" else student.dtype
    build = student.build
    if build is not None:
        build = {"vocab_size": vocabulary_size(Tokenizers(recipe).student), **build}
    found = {"student": read_shape(student.model, build, dtype, student.lora)}
    for place, section in recipe.scorers.items():
        if section.weights is None:
            continue
        source = section.weights.source
        kept = section.weights.dtype
        if source is None:
            if student.lora is None:
                found[place] = read_shape(student.model, build, dtype)
        else:
            found[place] = read_shape(source.name, None, "bfloat16" if kept == "auto" else kept)
    return found


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Who runs where."""

    shard: int
    """Ranks that hold one copy of the student between them, and of every teacher that is loaded beside it."""
    replicate: int = 1
    """Such copies."""
    servers: int = 0
    """Servers that write samples; 0: the trainer's ranks do."""
    server_gpus: int = 1
    teachers: int = 0
    """GPUs that serve teachers, each with all of them; 0: they are loaded in the trainer's ranks."""
    shard_teachers: bool = True
    """Whether those in the trainer's ranks are in shards too."""
    vocabulary: bool = False
    """Whether each rank of a shard projects with its rows of the output layer."""
    param_dtype: str | None = None
    """Precision in which weights are gathered; None: their own."""
    reduce_dtype: str | None = None
    """Precision in which gradients are summed; None: that of the gathered weights."""

    @property
    def ranks(self) -> int:
        return self.shard * self.replicate

    @property
    def gpus(self) -> int:
        return self.ranks + self.servers * self.server_gpus + self.teachers

    def describe(self) -> str:
        """In words."""
        words = [f"{self.ranks} trainer rank{'s' * (self.ranks > 1)}"]
        if self.shard > 1:
            more = ", teachers: true" if self.shard_teachers and not self.teachers else ""
            more += ", vocabulary: true" if self.vocabulary else ""
            dtypes = {"param_dtype": self.param_dtype, "reduce_dtype": self.reduce_dtype}
            more += "".join(f", {key}: {dtype}" for key, dtype in dtypes.items() if dtype is not None)
            words[0] += f" (parallel={{shard: {self.shard}, replicate: {self.replicate}{more}}})"
        if self.servers:
            words.append(f"{self.servers} vLLM server{'s' * (self.servers > 1)} of {self.server_gpus}")
        if self.teachers:
            words.append(f"{self.teachers} x serve-teacher")
        return " + ".join(words)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a step."""

    name: str
    flops: float
    """Operations over all GPUs."""
    bounds: Mapping[str, float]
    """Seconds that each limit takes by itself, by its formula."""

    @property
    def formula(self) -> str:
        """Formula of the limit that takes longest."""
        return max(self.bounds, key=self.bounds.__getitem__)

    @property
    def seconds(self) -> float:
        return self.bounds[self.formula]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A layout with what it needs."""

    layout: Layout
    memory: Mapping[str, Sequence[Item]]
    """Parts of one GPU's memory, by its role."""
    phases: Sequence[Phase]
    overlapped: bool
    room: float
    """Bytes of a card that are planned with."""

    @property
    def seconds(self) -> float:
        """Time of one step. Phases that overlap take as long as the longest."""
        times = [phase.seconds for phase in self.phases]
        return max(times) if self.overlapped else sum(times)

    @property
    def fits(self) -> bool:
        return all(peak(items) <= self.room for items in self.memory.values())

    @property
    def worst(self) -> tuple[str, int]:
        """The role that needs most of a GPU's memory, and its bytes."""
        role = max(self.memory, key=lambda role: peak(self.memory[role]))
        return role, peak(self.memory[role])


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The GPUs that are planned with, and the lengths that are expected."""

    gpus: int
    card: Card
    prompt_tokens: float
    response_tokens: float

    @property
    def room(self) -> float:
        return USABLE * self.card.memory * 1e9

    def link(self, gpus: int) -> float:
        """Bytes a second between GPUs of a group."""
        return self.card.link if gpus <= GPUS_A_MACHINE else min(NETWORK, self.card.link)


def machine_of(
    recipe: Recipe,
    gpus: int,
    *,
    card: str = "h100",
    gpu_memory: float | None = None,
    prompt_tokens: float | None = None,
    response_tokens: float | None = None,
) -> Machine:
    """Raises RecipeError for an unknown card or numbers that are none. Lengths are the recipe's limits unless given."""
    if card not in CARDS:
        raise RecipeError(f"there is no card {card!r}; {nearest(card, CARDS)}")
    for name, value in (
        ("--gpus", gpus),
        ("--gpu-memory", gpu_memory),
        ("--prompt-tokens", prompt_tokens),
        ("--response-tokens", response_tokens),
    ):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise RecipeError(f"{name} is {value}; it must be above 0")
    sheet = CARDS[card] if gpu_memory is None else replace(CARDS[card], memory=gpu_memory)
    return Machine(
        gpus=gpus,
        card=sheet,
        prompt_tokens=recipe.train.max_prompt_tokens if prompt_tokens is None else prompt_tokens,
        response_tokens=recipe.sampling.max_new_tokens if response_tokens is None else response_tokens,
    )


def plan(recipe: Recipe, machine: Machine, shapes: Mapping[str, Shape] | None = None) -> list[Planned]:
    """Every layout on at most so many GPUs, those that fit first, the quickest first.

    `shapes`: those of the recipe's models, where they are known. Raises RecipeError as `read_shape`.
    """
    if recipe.train.compute_dtype == "auto":
        # every card of the list has it
        recipe = replace(recipe, train=replace(recipe.train, compute_dtype="bfloat16"))
    shapes = shapes_of(recipe) if shapes is None else shapes
    student = shapes["student"]
    if recipe.parallel is not None and recipe.parallel.vocabulary and student.outside < 2 * student.head:
        raise RecipeError(
            "the student has one weight for embedding and output layer (tie_word_embeddings), which is gathered for the "
            "embedding anyway; remove parallel.vocabulary"
        )
    found = [planned(recipe, shapes, machine, layout) for layout in layouts(recipe, shapes, machine)]
    if not found:
        ranks = "1" if recipe.parallel is None else f"{recipe.parallel.shard} x {recipe.parallel.replicate}"
        raise RecipeError(
            f"the recipe's section parallel has {ranks} ranks, for which {machine.gpus} GPUs are not enough, or too many where "
            "the trainer writes the samples; give another --gpus, or remove the section to have a layout proposed"
        )
    return sorted(found, key=lambda one: (not one.fits, one.seconds if one.fits else 0, one.worst[1]))


def layouts(recipe: Recipe, shapes: Mapping[str, Shape], machine: Machine) -> Iterator[Layout]:
    """Trainer ranks in powers of two, or those of the section parallel, and what is left among servers; all GPUs in the trainer
    where it writes itself."""
    loaded = len(shapes) > 1
    powers = [2**n for n in range(machine.gpus.bit_length()) if 2**n <= machine.gpus]
    writes = recipe.uses.own_samples
    here = recipe.engine.runs_here or not writes
    for ranks in sorted({*powers, machine.gpus}):
        for shard in (one for one in powers if ranks % one == 0):
            given = recipe.parallel
            if given is not None and (shard, ranks) != (given.shard, given.shard * given.replicate):
                continue
            rest = machine.gpus - ranks
            together = loaded and (given is None or given.teachers)
            places: dict[str, Any] = {"shard": shard, "replicate": ranks // shard, "shard_teachers": together}
            places["vocabulary"] = given is not None and given.vocabulary
            if given is not None:
                places |= {"param_dtype": given.param_dtype, "reduce_dtype": given.reduce_dtype}
            elif shard > 1 and shapes["student"].size.number_bytes == BYTES["float32"]:
                # what float32 master weights are computed with on a GPU
                places |= {"param_dtype": "bfloat16", "reduce_dtype": "float32"}
            if here and rest == 0:
                yield Layout(**places)
            for teachers in {0, *(one for one in powers if loaded and one <= rest)}:
                left = rest - teachers
                if here and teachers and left == 0:
                    yield Layout(**places, teachers=teachers)
                for size in (one for one in powers if writes and left and left % one == 0 and one <= GPUS_A_MACHINE):
                    yield Layout(**places, servers=left // size, server_gpus=size, teachers=teachers)


def planned(recipe: Recipe, shapes: Mapping[str, Shape], machine: Machine, layout: Layout) -> Planned:
    """The memory and time of one layout."""
    student, others = shapes["student"], {place: shape for place, shape in shapes.items() if place != "student"}
    memory = {"trainer": trainer_memory(recipe, shapes, machine, layout)}
    card, train = machine.card, recipe.train
    samples = train.prompts_per_step * train.samples_per_prompt
    length = machine.prompt_tokens + machine.response_tokens
    phases = []
    if recipe.uses.own_samples:
        phases.append(writing(recipe, student, machine, layout, samples))
    if layout.servers:
        memory["engine"] = server_memory(student, machine, layout, rows=server_rows(student, machine, layout, samples))
    if layout.teachers:
        memory["teacher"] = [
            Item(place, shape.size.weights, "held", "weights x bytes of a weight") for place, shape in others.items()
        ]
    # of several teachers each sample is read by the one that its prompt names, or by all where they are weighted
    each = 1 if recipe.weights or not recipe.teachers else 1 / len(recipe.all_teachers)
    flops = sum(
        shape.forward(samples * length, length) * (each if place.startswith("teachers.") else 1)
        for place, shape in others.items()
    )
    if flops:
        on = layout.teachers or layout.ranks
        phases.append(
            Phase(
                name="score",
                flops=flops,
                bounds={
                    f"tokens x (2 P + 2 x layers x width x length) on {on} GPUs at {PASSES_SHARE:.0%} of the peak": flops
                    / (on * card.flops * PASSES_SHARE)
                },
            )
        )
    phases.append(updating(recipe, student, machine, layout, samples))
    if layout.servers:
        sent = student.parameters * 2 / machine.link(machine.gpus)
        phases.append(
            Phase(name="weights", flops=0, bounds={"P x 2 bytes over the link, to every server at once": sent})
        )
    overlapped = recipe.async_ is not None and recipe.async_.max_staleness > 0
    return Planned(layout=layout, memory=memory, phases=phases, overlapped=overlapped, room=machine.room)


def trainer_memory(recipe: Recipe, shapes: Mapping[str, Shape], machine: Machine, layout: Layout) -> list[Item]:
    """As the doctor counts it, with weights, gradients and moments divided among the ranks of a shard."""
    student = shapes["student"]
    here = {} if layout.teachers else {place: shape.size for place, shape in shapes.items() if place != "student"}
    offloaded = {place for place, section in recipe.scorers.items() if section.weights and section.weights.offload}
    vocabulary = student.head // max(1, student.size.hidden)
    run = Needs(
        recipe=replace(recipe, rollout=None) if not layout.servers else recipe,
        device=torch.device("cuda"),
        student=student.size,
        others={place: size for place, size in here.items() if place not in offloaded},
        vocab_size=vocabulary,
        ranks=layout.ranks,
    )
    items = []
    full = "full" in recipe.method.needs
    for item in memory_items(run):
        if item.name == "generation cache" and layout.servers:
            continue
        if item.name == "logits" and layout.vocabulary:
            # of the tokens of all ranks, in a rank's columns
            most = 4 * (1 + full) * chunk_elements(run.device) // layout.shard
            items.append(replace(item, size=min(item.size, most), formula=f"{item.formula} / {layout.shard} ranks"))
            continue
        whole = item.when != "held" and item.name != "gradients"
        whole |= item.name in here and not layout.shard_teachers
        divided = layout.shard > 1 and not whole
        items.append(
            replace(item, size=math.ceil(item.size / layout.shard), formula=f"{item.formula} / {layout.shard} ranks")
            if divided
            else item
        )
    if layout.shard > 1:
        each = BYTES.get(layout.param_dtype or "", student.size.number_bytes)
        # a head in slices is in no layer either, and is not gathered
        outside = (student.outside - layout.vocabulary * student.head) * each
        what = "all that is in no layer" + (" but the output layer" if layout.vocabulary else "")
        gathered = 2 * student.block * each + outside
        items.append(Item("gathered", gathered, "held", f"two layers, and {what}, whole"))
        # it is reduced once, by the last micro-batch; all of it is there when the logits are gone
        gradient = outside if student.size.trained == student.size.weights else 0
        logits = sum(item.size for item in items if item.name == "logits")
        more = f"that of {what}, whole, beyond the logits, which are gone by then"
        items.append(Item("its gradient", max(0, gradient - logits), "update", more))
        for place in here if full and (layout.shard_teachers or layout.vocabulary) else ():
            if place != "reference" or "reference" in recipe.method.needs:
                head = shapes[place].head * shapes[place].size.number_bytes
                parts = layout.shard if layout.vocabulary else 1
                formula = "V x H x bytes of a weight" + (f" / {parts} ranks" if parts > 1 else ", gathered")
                items.append(Item(f"output layer of {place}", math.ceil(head / parts), "update", formula))
        items = [item for item in items if item.size]
        if not layout.servers and recipe.uses.own_samples:
            items.append(
                Item(
                    "weights that write",
                    student.size.weights * each // student.size.number_bytes,
                    "generate",
                    "weights x bytes of a gathered weight, whole",
                )
            )
    return items


def server_memory(student: Shape, machine: Machine, layout: Layout, rows: int) -> list[Item]:
    length = machine.prompt_tokens + machine.response_tokens
    gpus = layout.server_gpus
    return [
        Item("weights", math.ceil(student.parameters * 2 / gpus), "held", f"P x 2 bytes / {gpus}"),
        Item(
            "keys and values",
            math.ceil(rows * length * student.size.cache_elements * 2 / gpus),
            "generate",
            f"{rows} samples x length x layers x 2 x heads of keys x their size x 2 bytes / {gpus}",
        ),
    ]


def server_rows(student: Shape, machine: Machine, layout: Layout, samples: int) -> int:
    """Samples that one server writes at a time: its share, as many as memory holds, at most SERVER_ROWS; at least one."""
    length = machine.prompt_tokens + machine.response_tokens
    free = machine.room * layout.server_gpus - student.parameters * 2
    fit = free // (length * student.size.cache_elements * 2)
    return max(1, int(min(math.ceil(samples / layout.servers), SERVER_ROWS, fit)))


def writing(recipe: Recipe, student: Shape, machine: Machine, layout: Layout, samples: int) -> Phase:
    """Each token takes one read of the weights and of the keys and values so far, or its arithmetic where that is more."""
    from understudy.engines.hf.engine import MAX_BATCH_TOKENS

    card, response = machine.card, machine.response_tokens
    length = machine.prompt_tokens + response
    if layout.servers:
        places, gpus, each = layout.servers, layout.server_gpus, 2
        rows = server_rows(student, machine, layout, samples)
    else:
        places, gpus, each = layout.ranks, 1, student.size.number_bytes
        rows = max(1, min(math.ceil(samples / places), int(MAX_BATCH_TOKENS // length)))
    turns = math.ceil(samples / places / rows)
    read = student.active * each + rows * (machine.prompt_tokens + response / 2) * student.size.cache_elements * each
    flops = student.forward(samples * response, length) + student.forward(
        recipe.train.prompts_per_step * machine.prompt_tokens, machine.prompt_tokens
    )
    bounds = {
        f"{turns} x {response:,.0f} tokens, each one read of the weights and of {rows} samples' keys and values at "
        f"{DECODE_SHARE:.0%} of the bandwidth": turns * response * read / (gpus * card.bandwidth * DECODE_SHARE),
        f"its arithmetic at {PASSES_SHARE:.0%} of the peak": flops / (places * gpus * card.flops * PASSES_SHARE),
    }
    if not layout.servers:
        started = turns * response * student.size.layers * HF_LAYER_S
        bounds[f"{turns} x {response:,.0f} tokens x {student.size.layers} layers x {HF_LAYER_S * 1e3:g} ms"] = started
    return Phase(name="generate", flops=flops, bounds=bounds)


def updating(recipe: Recipe, student: Shape, machine: Machine, layout: Layout, samples: int) -> Phase:
    """A forward and twice as much backward, or the collectives of a shard where they take longer."""
    train, card = recipe.train, machine.card
    length = machine.prompt_tokens + machine.response_tokens
    fixed = train.minibatches * train.passes > 1 or recipe.method.scope == "batch"
    # frozen weights get no gradient of their own
    backward = 1 + student.size.trained / student.size.weights
    passes = train.passes * (1 + backward + train.gradient_checkpointing) + fixed
    flops = passes * student.forward(samples * length, length)
    moved = collectives(recipe, student, machine, layout, samples)
    of_rows = ", hidden states exchanged" if layout.vocabulary else ""
    return Phase(
        name="update",
        flops=flops,
        bounds={
            f"{passes:g} forward passes on {layout.ranks} GPUs at {PASSES_SHARE:.0%} of the peak": flops
            / (layout.ranks * card.flops * PASSES_SHARE),
            f"weights gathered and gradients summed{of_rows}, over the link": sum(moved.values()),
        },
    )


def collectives(recipe: Recipe, student: Shape, machine: Machine, layout: Layout, samples: int) -> dict[str, float]:
    """Seconds that a rank needs the link for in a step: to gather weights of shards, to reduce gradients over a shard's ranks,
    and to sum them over replicas; with a head in slices also for the hidden states of all ranks and their gradient."""
    train = recipe.train
    length = machine.prompt_tokens + machine.response_tokens
    tokens = train.micro_batch_tokens or 16_384
    batches = max(1, math.ceil(samples * length / layout.ranks / max(tokens, length))) * train.passes
    updates = train.minibatches * train.passes
    share = (layout.shard - 1) / layout.shard
    own = student.head if layout.vocabulary else 0
    weight_bytes = BYTES.get(layout.param_dtype or "", student.size.number_bytes)
    gradient_bytes = BYTES.get(layout.reduce_dtype or "", weight_bytes)
    # for forward and backward of each micro-batch
    gathered = share * (student.parameters - own) * weight_bytes * batches * (2 + train.gradient_checkpointing)
    whole = recipe.parallel is not None and recipe.parallel.gradients == "whole"
    trained = student.size.trained / student.size.number_bytes
    reduced = share * (trained - own) * gradient_bytes * (updates if whole else batches)
    copies = layout.replicate
    summed = 2 * (copies - 1) / copies * trained * gradient_bytes / layout.shard * updates
    found = {
        "weights gathered": gathered / machine.link(layout.shard),
        "gradients reduced": reduced / machine.link(layout.shard),
        "gradients summed over replicas": summed / machine.link(layout.ranks),
    }
    if layout.vocabulary:
        # those of all ranks of a group come in 16 bits, and their gradient is summed in 32
        rows = samples * machine.response_tokens * train.passes / copies
        found["hidden states exchanged"] = share * rows * student.size.hidden * (2 + 2 * 4) / machine.link(layout.shard)
    return found


def remedies(recipe: Recipe, machine: Machine) -> Iterator[tuple[str, Planned]]:
    """Changes of a recipe that no layout fits, one at a time and then together, and what then fits."""
    train = recipe.train
    changes: list[tuple[str, Recipe]] = []
    checkpointed = replace(recipe, train=replace(train, gradient_checkpointing=True))
    if not train.gradient_checkpointing:
        changes.append(("train.gradient_checkpointing=true", checkpointed))
    longest = train.max_prompt_tokens + recipe.sampling.max_new_tokens
    if (train.micro_batch_tokens or 16_384) > longest:
        small = replace(checkpointed, train=replace(checkpointed.train, micro_batch_tokens=longest))
        changes.append((f"train.gradient_checkpointing=true train.micro_batch_tokens={longest}", small))
    if recipe.student.lora is None and recipe.student.model is not None:
        adapted = replace(checkpointed, student=replace(recipe.student, lora=Lora()))
        changes.append(("student.lora={rank: 16} train.gradient_checkpointing=true", adapted))
    for words, changed in changes:
        best = plan(changed, machine)[0]
        if best.fits:
            yield words, best
    more = machine.gpus
    while more < 64 * machine.gpus:
        more *= 2
        best = plan(recipe, replace(machine, gpus=more))[0]
        if best.fits:
            yield f"{more} GPUs", best
            return


def show(console: Console, recipe: Recipe, machine: Machine, price: float | None = None) -> None:
    """Prints the best layout with its numbers and their formulas, others beside it, and what would fit where none does."""
    found = plan(recipe, machine)
    best, samples = found[0], recipe.train.prompts_per_step * recipe.train.samples_per_prompt
    lengths = f"prompts of {machine.prompt_tokens:,.0f} and responses of {machine.response_tokens:,.0f} tokens"
    console.note(f"{samples:,} samples a step, {lengths}; {machine.gpus} GPUs with {machine.card.memory:g} GB each")
    unknown = [place for place, section in recipe.scorers.items() if section.weights is None]
    if unknown:
        console.note(f"not counted: {', '.join(unknown)}, whose model the recipe does not name")
    room = amount(int(best.room))
    if not best.fits:
        role, size = best.worst
        console.warn(f"no layout fits: the smallest takes {amount(size)} of {room} on each GPU of the {role}")
    console.note(f"layout: {best.layout.describe()}")
    columns = ["role", "part", "size", "when", "formula"]
    rows = [
        [role, item.name, amount(item.size), WHEN[item.when], item.formula]
        for role, items in best.memory.items()
        for item in sorted(items, key=lambda item: -item.size)
    ]
    rows += [[role, "peak", amount(peak(items)), "", f"of {room}"] for role, items in best.memory.items()]
    console.table("memory of one GPU", columns, rows)
    rows = [[phase.name, number(phase.flops), number(phase.seconds), phase.formula] for phase in best.phases]
    how = "the longest, for they overlap" if best.overlapped else "one after the other"
    rows.append(["step", number(sum(phase.flops for phase in best.phases)), number(best.seconds), how])
    console.table("time of one step", ["phase", "operations", "seconds", "formula"], rows)
    hours = best.seconds * best.layout.gpus / 3600
    total = f"{recipe.train.steps:,} steps: {number(hours * recipe.train.steps)} GPU hours"
    if price is not None:
        cost = hours * price
        total += f"; {number(cost)} a step, {number(cost * recipe.train.steps)} in all at {price:g} an hour"
    console.note(total)
    if best.fits and len(found) > 1:
        rows = [
            [one.layout.describe(), amount(one.worst[1]), number(one.seconds), f"{one.seconds / best.seconds:.2f}"]
            for one in found[:5]
            if one.fits
        ]
        console.table("layouts that fit", ["layout", "peak of a GPU", "seconds a step", "x the first"], rows)
    if not best.fits:
        rows = [[words, one.layout.describe(), amount(one.worst[1])] for words, one in remedies(recipe, machine)]
        if rows:
            console.table("what would fit", ["change", "layout", "peak of a GPU"], rows)
