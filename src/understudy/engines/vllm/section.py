"""The section `rollout` of type `vllm`, which opens the engine."""

from __future__ import annotations

from dataclasses import dataclass

from understudy.engines.sections import EngineSetup
from understudy.engines.vllm.engine import VLLMEngine
from understudy.engines.vllm.settings import VLLMKeys


@dataclass(frozen=True, kw_only=True)
class VLLM(VLLMKeys):
    """vLLM servers, version 0.20 or later, with `VLLM_SERVER_DEV_MODE=1`, which opens the routes that replace weights."""

    def open(self, setup: EngineSetup) -> VLLMEngine:
        return VLLMEngine(
            self.for_responses(setup.max_new_tokens),
            setup.model,
            setup.tokenizer,
            seed=setup.seed,
            stop_ids=setup.stop_ids,
            vocab_size=setup.vocab_size,
            sampling=setup.sampling,
            run_dir=setup.run_dir,
            autocast=setup.autocast,
        )
