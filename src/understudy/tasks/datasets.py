"""Data sets that the field trains and measures on, by name: where they lie on the hub, and what their fields mean.

A task of one of their types takes a name, `task: {type: math, dataset: gsm8k}`, and every key that it does not set from the
table. `path` reads a local copy with the same fields; the keys of `Records` say where a copy calls them something else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from understudy.errors import DataError, RecipeError, nearest
from understudy.tasks.base import Split
from understudy.tasks.records import File, Hub, Records
from understudy.tasks.rows import Row, bare_name
from understudy.tasks.verifiers.ifbench import UNCHECKED


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set of the Hugging Face hub. Looked up in its card; a size is what the card says, before `where`."""

    task: str
    """Type of the tasks that read it."""
    hub: str
    """`owner/name`; empty: it is not there in one piece, and local files are read."""
    splits: Mapping[Split, str]
    """The data set's own name of each split, the one to train on first."""
    keys: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the task that read its rows: which field means what, which rows are taken."""
    configs: tuple[str | None, ...] = (None,)
    """Its configurations, read one after the other."""
    sizes: Mapping[Split, int] = field(default_factory=dict)
    """Rows of each split, as far as they are known."""
    licence: str
    """From its card; "unknown" if the card has none."""
    source: str
    """The paper, or the contest."""
    listed: bool = False
    """Whether its references are lists of JSON in a string."""
    gated: bool = False
    """Whether the hub asks to accept terms first."""
    mistakes: Mapping[str, str] = field(default_factory=dict)
    """Known upstream mistakes: the key of a problem (the last part of its prompt's id) -> what is wrong."""


_ANSWERED = {"prompt_field": "problem", "reference_field": "answer"}
_SOLVED = {**_ANSWERED, "solution_field": "solution"}
_MAA = "unknown; problems (c) MAA"
_OPTIONS = {"prompt_field": "question", "choices_field": "choices", "reference_field": "answer"}
_SERVED = {"prompt_field": "instruction", "reference_field": "actions"}
_ARC = {**_OPTIONS, "reference_field": "answerKey"}
_INSTRUCTED = {"prompt_field": "prompt", "reference_field": "instruction_id_list", "kwargs_field": "kwargs"}
_PLUS = {"prompt_field": "prompt", "reference_field": "test"}
_SUBJECTS = (
    "abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry "
    "college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics "
    "econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology "
    "high_school_chemistry high_school_computer_science high_school_european_history high_school_geography "
    "high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics "
    "high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history "
    "human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing "
    "medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory professional_accounting "
    "professional_law professional_medicine professional_psychology public_relations security_studies sociology "
    "us_foreign_policy virology world_religions"
)
"""The subjects of MMLU."""

_TRUE_OF_IMAGE = (
    "{prompt}\nIs this sentence true of the image? Please reason step by step, and put true or false within \\boxed{}."
)


def _live(config: str, size: int) -> DataSet:
    """LiveCodeBench's problems up to a release, or those that came with it; a copy in Parquet, for the original is a script."""
    return DataSet(
        task="code",
        hub="lighteval/code_generation_lite",
        configs=(config,),
        splits={"test": "test"},
        keys={"prompt_field": "question_content", "reference_field": "public_test_cases, private_test_cases"},
        sizes={"test": size},
        licence="CC, no version named",
        source="arXiv 2403.07974",
    )


def _questions(config: str, splits: Mapping[Split, str], sizes: Mapping[Split, int], source: str) -> DataSet:
    """Question answering in FlashRAG's form, which Search-R1 and those after it train and measure with."""
    return DataSet(
        task="qa",
        hub="RUC-NLPIR/FlashRAG_datasets",
        configs=(config,),
        splits=splits,
        keys={"prompt_field": "question", "reference_field": "golden_answers"},
        sizes=sizes,
        licence="CC BY-SA 4.0",
        source=source,
    )


DATASETS: dict[str, DataSet] = {
    "gsm8k": DataSet(
        task="math",
        hub="openai/gsm8k",
        configs=("main",),
        splits={"train": "train", "test": "test"},
        keys={
            "prompt_field": "question",
            "reference_field": "answer",
            "reference_after": "####",
            "solution_field": "answer",
        },
        sizes={"train": 7473, "test": 1319},
        licence="MIT",
        source="arXiv 2110.14168",
    ),
    "math500": DataSet(
        task="math",
        hub="HuggingFaceH4/MATH-500",
        splits={"test": "test"},
        keys=_SOLVED,
        sizes={"test": 500},
        licence="MIT",
        source="arXiv 2305.20050",
    ),
    "aime24": DataSet(
        task="math",
        hub="HuggingFaceH4/aime_2024",
        splits={"test": "train"},
        keys=_SOLVED,
        sizes={"test": 30},
        licence=_MAA,
        source="AIME I and II, 2024",
    ),
    "aime25": DataSet(
        task="math",
        hub="math-ai/aime25",
        splits={"test": "test"},
        keys=_ANSWERED,
        sizes={"test": 30},
        licence="Apache-2.0; problems (c) MAA",
        source="AIME I and II, 2025",
    ),
    "amc23": DataSet(
        task="math",
        hub="math-ai/amc23",
        splits={"test": "test"},
        keys={"prompt_field": "question", "reference_field": "answer"},
        sizes={"test": 40},
        licence=_MAA,
        source="AMC 12, 2023",
    ),
    "hmmt25": DataSet(
        task="math",
        hub="MathArena/hmmt_feb_2025",
        splits={"test": "train"},
        keys=_ANSWERED,
        sizes={"test": 30},
        licence="CC BY-NC-SA 4.0",
        source="HMMT, February 2025",
    ),
    "hmmt25-nov": DataSet(
        task="math",
        hub="MathArena/hmmt_nov_2025",
        splits={"test": "train"},
        keys=_ANSWERED,
        licence="CC BY-NC-SA 4.0",
        source="HMMT, November 2025",
    ),
    "minerva": DataSet(
        task="math",
        hub="math-ai/minervamath",
        splits={"test": "test"},
        keys={"prompt_field": "question", "reference_field": "answer"},
        licence="unknown",
        source="arXiv 2206.14858",
    ),
    "dapo-17k": DataSet(
        task="math",
        hub="open-r1/DAPO-Math-17k-Processed",
        configs=("all",),
        splits={"train": "train"},
        keys={"prompt_field": "prompt", "reference_field": "solution"},
        licence="Apache-2.0",
        source="arXiv 2503.14476",
    ),
    "deepmath-103k": DataSet(
        task="math",
        hub="zwhe99/DeepMath-103K",
        splits={"train": "train"},
        keys={
            "prompt_field": "question",
            "reference_field": "final_answer",
            "solution_field": "r1_solution_1",
            "where": ("difficulty >= 6",),
        },
        sizes={"train": 103110},
        licence="MIT",
        source="arXiv 2504.11456",
    ),
    "deepscaler": DataSet(
        task="math",
        hub="agentica-org/DeepScaleR-Preview-Dataset",
        splits={"train": "train"},
        keys=_ANSWERED,
        sizes={"train": 40315},
        licence="MIT",
        source="DeepScaleR, 2025",
    ),
    "openthoughts3-math": DataSet(
        task="math",
        hub="open-thoughts/OpenThoughts3-1.2M",
        splits={"train": "train"},
        keys={"prompt_field": "conversations", "where": ("domain = math",)},
        sizes={"train": 1200000},
        licence="Apache-2.0",
        source="arXiv 2506.04178",
    ),
    "skywork-or1": DataSet(
        task="math",
        hub="Skywork/Skywork-OR1-RL-Data",
        splits={"train": "math"},
        keys={"prompt_field": "prompt", "reference_field": "reward_model.ground_truth"},
        sizes={"train": 105055},
        licence="unknown",
        source="arXiv 2505.22312",
        listed=True,
    ),
    "mmlu": DataSet(
        task="choice",
        hub="cais/mmlu",
        configs=("all",),
        splits={"validation": "validation", "test": "test"},
        keys=_OPTIONS,
        sizes={"test": 14042},
        licence="MIT",
        source="arXiv 2009.03300",
    ),
    "mmlu-stem": DataSet(
        task="choice",
        hub="TIGER-Lab/MMLU-STEM",
        splits={"test": "test"},
        keys=_OPTIONS,
        licence="MIT",
        source="arXiv 2009.03300",
    ),
    "mmlu-redux": DataSet(
        task="choice",
        hub="edinburgh-dawg/mmlu-redux-2.0",
        configs=tuple(_SUBJECTS.split()),
        splits={"test": "test"},
        keys={**_OPTIONS, "where": ("error_type = ok",)},
        sizes={"test": 5700},
        licence="CC BY 4.0",
        source="arXiv 2406.04127",
    ),
    "mmlu-pro": DataSet(
        task="choice",
        hub="TIGER-Lab/MMLU-Pro",
        splits={"validation": "validation", "test": "test"},
        keys={**_OPTIONS, "choices_field": "options"},
        licence="MIT",
        source="arXiv 2406.01574",
    ),
    "arc-challenge": DataSet(
        task="choice",
        hub="allenai/ai2_arc",
        configs=("ARC-Challenge",),
        splits={"train": "train", "validation": "validation", "test": "test"},
        keys=_ARC,
        sizes={"train": 1119, "validation": 299, "test": 1172},
        licence="CC BY-SA 4.0",
        source="arXiv 1803.05457",
    ),
    "arc-easy": DataSet(
        task="choice",
        hub="allenai/ai2_arc",
        configs=("ARC-Easy",),
        splits={"train": "train", "validation": "validation", "test": "test"},
        keys=_ARC,
        sizes={"train": 2251, "validation": 570, "test": 2376},
        licence="CC BY-SA 4.0",
        source="arXiv 1803.05457",
    ),
    "gpqa-diamond": DataSet(
        task="choice",
        hub="Idavidrein/gpqa",
        configs=("gpqa_diamond",),
        splits={"test": "train"},
        keys={
            "prompt_field": "Question",
            "choices_field": "Correct Answer, Incorrect Answer 1, Incorrect Answer 2, Incorrect Answer 3",
            "reference_field": "Correct Answer",
        },
        sizes={"test": 198},
        licence="CC BY 4.0; gated",
        source="arXiv 2311.12022",
        gated=True,
    ),
    "ifeval": DataSet(
        task="instructions",
        hub="google/IFEval",
        splits={"test": "train"},
        keys=_INSTRUCTED,
        sizes={"test": 541},
        licence="Apache-2.0",
        source="arXiv 2311.07911",
    ),
    "ifbench": DataSet(
        task="instructions",
        hub="allenai/IFBench_test",
        splits={"test": "train"},
        keys={**_INSTRUCTED, "where": tuple(f"instruction_id_list != {name}" for name in UNCHECKED)},
        licence="ODC-BY 1.0",
        source="arXiv 2507.02833",
    ),
    "humaneval": DataSet(
        task="code",
        hub="openai/openai_humaneval",
        splits={"test": "test"},
        keys={**_PLUS, "solution_field": "canonical_solution"},
        sizes={"test": 164},
        licence="MIT",
        source="arXiv 2107.03374",
    ),
    "humaneval-plus": DataSet(
        task="code",
        hub="evalplus/humanevalplus",
        splits={"test": "test"},
        keys={**_PLUS, "solution_field": "canonical_solution"},
        sizes={"test": 164},
        licence="Apache-2.0",
        source="arXiv 2305.01210",
    ),
    "mbpp": DataSet(
        task="code",
        hub="google-research-datasets/mbpp",
        configs=("full",),
        splits={"train": "train", "validation": "validation", "test": "test"},
        keys={"prompt_field": "text", "reference_field": "test_list", "solution_field": "code"},
        sizes={"train": 374, "validation": 90, "test": 500},
        licence="CC BY 4.0",
        source="arXiv 2108.07732",
    ),
    "mbpp-sanitized": DataSet(
        task="code",
        hub="google-research-datasets/mbpp",
        configs=("sanitized",),
        splits={"train": "train", "validation": "validation", "test": "test"},
        keys={"prompt_field": "prompt", "reference_field": "test_list", "solution_field": "code"},
        sizes={"train": 120, "validation": 43, "test": 257},
        licence="CC BY 4.0",
        source="arXiv 2108.07732",
    ),
    "mbpp-plus": DataSet(
        task="code",
        hub="evalplus/mbppplus",
        splits={"test": "test"},
        keys={**_PLUS, "solution_field": "code"},
        sizes={"test": 378},
        licence="Apache-2.0",
        source="arXiv 2305.01210",
    ),
    "eurus-code": DataSet(
        task="code",
        hub="PRIME-RL/Eurus-2-RL-Data",
        splits={"train": "train", "validation": "validation"},
        keys={
            "prompt_field": "prompt",
            "reference_field": "reward_model.ground_truth",
            "where": ("ability = code",),
        },
        licence="MIT",
        source="arXiv 2502.01456",
    ),
    "livecodebench": _live("release_v6", 1055),
    "livecodebench-v5": _live("v5", 167),
    "livecodebench-v6": _live("v6", 175),
    "apps": DataSet(
        task="code",
        hub="",
        splits={"train": "train", "test": "test"},
        keys={"prompt_field": "question", "reference_field": "input_output"},
        sizes={"train": 5000, "test": 5000},
        licence="MIT",
        source="arXiv 2105.09938, train.jsonl and test.jsonl of the hub's codeparrot/apps",
    ),
    "taco": DataSet(
        task="code",
        hub="BAAI/TACO",
        configs=("ALL",),
        splits={"train": "train", "test": "test"},
        keys={"prompt_field": "question", "reference_field": "input_output"},
        sizes={"train": 25443, "test": 1000},
        licence="Apache-2.0",
        source="arXiv 2312.14852",
    ),
    "code-contests": DataSet(
        task="code",
        hub="deepmind/code_contests",
        splits={"train": "train", "validation": "valid", "test": "test"},
        keys={"prompt_field": "description", "reference_field": "public_tests, private_tests, generated_tests"},
        sizes={"validation": 117, "test": 165},
        licence="CC BY 4.0",
        source="arXiv 2203.07814",
    ),
    "bfcl": DataSet(
        task="calls",
        hub="",
        splits={"test": "test"},
        keys={"prompt_field": "question", "reference_field": "ground_truth"},
        licence="Apache-2.0",
        source="Berkeley Function-Calling Leaderboard",
        mistakes={
            "82d770660f45945c": "live_simple_106-63-0 accepts no value of the required auto_loan_payment_start",
            "130db1e9c14f301a": "live_simple_112-68-0 accepts no value of five required arguments",
        },
    ),
    "tau-retail": DataSet(
        task="customers",
        hub="",
        splits={"train": "train", "validation": "dev", "test": "test"},
        keys=_SERVED,
        sizes={"train": 500, "validation": 20, "test": 115},
        licence="MIT",
        source="arXiv 2406.12045",
    ),
    "tau-airline": DataSet(
        task="customers",
        hub="",
        splits={"test": "test"},
        keys=_SERVED,
        sizes={"test": 50},
        licence="MIT",
        source="arXiv 2406.12045",
    ),
    "nq": _questions(
        "nq",
        {"train": "train", "validation": "dev", "test": "test"},
        {"train": 79168, "validation": 8757, "test": 3610},
        "arXiv 1906.00300",
    ),
    "triviaqa": _questions(
        "triviaqa",
        {"train": "train", "validation": "dev", "test": "test"},
        {"train": 78785, "validation": 8837, "test": 11313},
        "arXiv 1705.03551",
    ),
    "popqa": _questions("popqa", {"test": "test"}, {"test": 14267}, "arXiv 2212.10511"),
    "hotpotqa": _questions(
        "hotpotqa", {"train": "train", "test": "dev"}, {"train": 90447, "test": 7405}, "arXiv 1809.09600"
    ),
    "2wiki": _questions(
        "2wikimultihopqa", {"train": "train", "test": "dev"}, {"train": 15000, "test": 12576}, "arXiv 2011.01060"
    ),
    "musique": _questions(
        "musique", {"train": "train", "test": "dev"}, {"train": 19938, "test": 2417}, "arXiv 2108.00573"
    ),
    "bamboogle": _questions("bamboogle", {"test": "test"}, {"test": 125}, "arXiv 2210.03350"),
    "geometry3k": DataSet(
        task="vision",
        hub="hiyouga/geometry3k",
        splits={"train": "train", "validation": "validation", "test": "test"},
        keys={**_ANSWERED, "image_field": "images"},
        sizes={"train": 2101, "validation": 300, "test": 601},
        licence="MIT",
        source="arXiv 2105.04165",
    ),
    "nlvr": DataSet(
        task="vision",
        hub="",
        splits={"train": "train", "validation": "dev", "test": "test"},
        keys={
            "prompt_field": "sentence",
            "image_field": "image",
            "reference_field": "label",
            "template": _TRUE_OF_IMAGE,
        },
        licence="CC BY 4.0",
        source="ACL 2017, github.com/lil-lab/nlvr",
    ),
}
"""Name -> data set."""


@dataclass(frozen=True, kw_only=True)
class Named(Records):
    """A task that reads a data set by its name, or local files of the same kind.

    A key of `Records` that is left at its default is the data set's (`understudy tasks show NAME`). Raises ValueError for a
    name that is not in `DATASETS`, or of another type.
    """

    kind: ClassVar[str]
    """`task.type`."""

    dataset: str | None = None
    """A name that `understudy tasks` lists; None: `path` says where the rows are."""
    path: str | None = None
    """A local file, folder or pattern in place of the hub: the training rows, or those of the only split."""
    validation_path: str | None = None
    """Rows of the split `validation`."""
    test_path: str | None = None
    """Rows of the split `test`."""
    revision: str | None = None
    """A commit or tag of the hub; set it for reproducible results."""
    prompt_field: str = ""
    """Empty: that of the data set."""

    def __post_init__(self) -> None:
        data = self.data
        if data is None and not self.local:
            raise ValueError("give dataset, a name that `understudy tasks` lists, or path")
        if data is not None and data.task != self.kind:
            raise ValueError(
                f"{self.dataset!r} is of another type; write {{type: {data.task}, dataset: {self.dataset}}}"
            )
        if data is not None and not data.hub and not self.local:
            raise ValueError(
                f"the data set {self.dataset} ({data.source}) is not on the hub; set path to a copy of its rows"
            )
        if self.local and self.revision is not None:
            raise ValueError("revision is a commit of the hub; local files have none")
        given = {key: getattr(self, key) for key in data.keys} if data is not None else {}
        defaults = {key: value for key, value in (data.keys if data is not None else {}).items() if not given[key]}
        if given.get("reference_field"):
            # what follows the mark is said of the data set's own field
            defaults.pop("reference_after", None)
        for key, value in defaults.items():
            object.__setattr__(self, key, value)
        if not self.prompt_field:
            raise ValueError("prompt_field is missing; it names the field of the prompt")
        if self.validation_share > 0 and "train" not in self.sources():
            raise ValueError(f"validation_share is a share of the training rows, of which {self.name} has none")
        super().__post_init__()

    @property
    def data(self) -> DataSet | None:
        """The data set of that name. Raises ValueError for a name that is not in the table."""
        if self.dataset is None:
            return None
        if self.dataset not in DATASETS:
            known = [name for name, data in DATASETS.items() if data.task == self.kind]
            raise ValueError(
                f"there is no data set {self.dataset!r} of type {self.kind}; {nearest(self.dataset, known)} (for another one "
                "write {type: hub, dataset: OWNER/NAME, prompt_field: ...}, or path)"
            )
        return DATASETS[self.dataset]

    @property
    def mistakes(self) -> Mapping[str, str]:
        return {} if self.data is None else self.data.mistakes

    @property
    def local(self) -> Mapping[Split, str]:
        """The local files, by their split."""
        paths: dict[Split, str | None]
        paths = {"train": self.path, "validation": self.validation_path, "test": self.test_path}
        found = {split: path for split, path in paths.items() if path is not None}
        if list(found) == ["train"] and self.data is not None and "train" not in self.data.splits:
            return {next(iter(self.data.splits)): found["train"]}
        return found

    @property
    def name(self) -> str:
        return self.dataset or bare_name(next(iter(self.local.values())))

    def sources(self) -> Mapping[str, str]:
        return cast("Mapping[str, str]", self.local or ({} if self.data is None else self.data.splits))

    @cached_property
    def _readers(self) -> tuple[File | Hub, ...]:
        """One for each configuration of the data set."""
        if self.local:
            return (File(path=self.name, prompt_field=self.prompt_field),)
        data = cast(DataSet, self.data)
        return tuple(
            Hub(dataset=data.hub, config=config, revision=self.revision, prompt_field=self.prompt_field)
            for config in data.configs
        )

    def check_split(self, split: Split) -> None:
        only = self.first_split
        if split == "train" and self.path is not None and only != "train":
            raise RecipeError(
                f"{self.name} has no train split, so path alone is its {only} split; with {only}_path beside it path is "
                "trained on"
            )
        super().check_split(split)

    def rows(self, source: str) -> Iterator[Row]:
        for reader in self._readers:
            yield from reader.rows(source)

    def folder(self, source: str) -> Path:
        return self._readers[0].folder(source)

    def commit(self, source: str) -> str | None:
        return self._readers[0].commit(source)

    def _stamp(self, source: str) -> object:
        return self._readers[0]._stamp(source)

    @property
    def is_local(self) -> bool:
        return bool(self.local)

    def check_files(self) -> None:
        """Reads nothing from the network."""
        if self.is_local:
            super().check_files()

    def on_file(self, path: str) -> Self:
        own: dict[str, Any] = {"dataset": None, "revision": None, "validation_share": 0.0, "limit": None, "where": ()}
        return replace(self, path=path, validation_path=path, test_path=path, **own)

    def _references(self, place: str, row: Mapping[str, Any]) -> tuple[str, ...]:
        found = super()._references(place, row)
        if self.data is None or not self.data.listed:
            return found
        try:
            answers = [answer for text in found for answer in json.loads(text)]
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{place}: field {self.reference_field!r} is {found[0]!r}; it must be a list of JSON"
            ) from error
        return tuple(map(str, answers))
