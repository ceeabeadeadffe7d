"""Names that other toolkits (TRL, verl, ms-swift, transformers) have for keys, to be suggested where a recipe uses them."""

from __future__ import annotations

from collections.abc import Mapping

_NAMES: Mapping[str, str] = {
    "run_dir, whose last part names the run": "run_name experiment_name exp_name project_name wandb_project",
    "run_dir": "output_dir out_dir save_dir log_dir logging_dir default_local_dir",
    "seed": "random_seed data_seed",
    "loggers": "report_to logger log_with wandb tensorboard trackio",
    "loggers; every step is written to metrics.jsonl": "logging_steps log_freq",
    "student.model, or teacher.model": "model",
    "student.model": "model_name_or_path model_name model_path base_model student_model pretrained_model",
    "student.tokenizer": "tokenizer_name tokenizer_path tokenizer_name_or_path",
    "student.template_kwargs": "chat_template_kwargs apply_chat_template_kwargs",
    "student.dtype": "torch_dtype model_dtype precision",
    "student.attn_implementation": "flash_attn use_flash_attention_2 attn_impl",
    "student.lora": "peft_config use_lora use_peft peft",
    "student.lora.rank": "lora_r lora_rank r",
    "student.lora.alpha": "lora_alpha",
    "student.lora.dropout": "lora_dropout",
    "student.lora.target_modules": "lora_target_modules",
    "teacher.model": "teacher_model teacher_model_name_or_path teacher_path teacher_model_path",
    "teacher.url": "teacher_url teacher_model_server teacher_model_server_url base_url api_base",
    "reference": "ref ref_model reference_model",
    "task.path": "train_path train_file train_files train_data data_path data_files data_file dataset_path",
    "task.dataset": "dataset_name dataset_id hub_dataset train_dataset",
    "task.split_train": "dataset_split train_split dataset_train_split",
    "task.prompt_field": "prompt_key prompt_column input_key question_field query_key prompt_name",
    "task.reference_field": "answer_key answer_field answer_column label_key label_field reference_key ground_truth",
    "task.solution_field": "response_key completion_field completion_key response_field target_field",
    "task.system": "system_prompt system_message",
    "task.template": "prompt_template",
    "task.limit": "max_samples max_train_samples num_train_samples",
    "task.verifier": "reward_funcs reward_func reward_fn reward_function reward_model",
    "method.type": "loss_type loss_mode trainer_type rlhf_type algorithm adv_estimator",
    "method.on_policy_share": "lmbda student_data_fraction",
    "method.k": "top_k_logits topk_logits topk_logits_k logits_topk gkd_logits_topk loss_top_k num_logprobs",
    "method.kl_coef": "kl_loss_coef kl_coeff kl_beta init_kl_coef kl_penalty_coef",
    "method.clip": "clip_ratio clip_range cliprange epsilon",
    "method.clip_low": "epsilon_low clip_ratio_low",
    "method.clip_high": "epsilon_high clip_ratio_high",
    "method.normalise_std": "scale_rewards norm_adv_by_std_in_grpo normalize_std",
    "sampling.max_new_tokens": "max_completion_length max_response_length max_tokens response_length max_new_token",
    "sampling.temperature": "temperature rollout_temperature generation_temperature",
    "sampling.temperature; 0 is greedy": "do_sample",
    "rollout.type: vllm": "use_vllm vllm vllm_mode inference_backend rollout_engine",
    "rollout.url": "vllm_server_base_url vllm_server_host",
    "rollout.launch": "tensor_parallel_size vllm_tensor_parallel_size gpu_memory_utilization vllm_gpu_memory_utilization",
    "train.steps": "max_steps num_steps total_steps num_train_steps total_training_steps max_iters iterations",
    "train.steps; an epoch has as many as the data has prompts, divided by train.prompts_per_step": "num_train_epochs "
    "num_epochs epochs total_epochs epoch",
    "train.prompts_per_step, all prompts of one step": "per_device_train_batch_size train_batch_size batch_size "
    "global_batch_size rollout_batch_size gen_batch_size num_prompts_per_step",
    "train.samples_per_prompt": "num_generations n num_return_sequences n_samples_per_prompt num_generations_per_prompt "
    "group_size rollout_n",
    "train.micro_batch_tokens, the tokens of one forward; a step is cut into as many as it needs": "micro_batch_size "
    "gradient_accumulation_steps gradient_accumulation ppo_micro_batch_size ppo_micro_batch_size_per_gpu "
    "ppo_max_token_len_per_gpu max_tokens_per_gpu per_device_batch_size",
    "train.minibatches": "steps_per_generation num_minibatches num_mini_batches ppo_mini_batch_size mini_batch_size",
    "train.passes": "num_iterations ppo_epochs mu",
    "train.max_prompt_tokens, and sampling.max_new_tokens for the response": "max_length max_seq_length max_seq_len "
    "max_model_len cutoff_len",
    "train.max_prompt_tokens": "max_prompt_length prompt_length max_input_length",
    "train.lr": "lr learning_rate learningrate lr_rate",
    "train.schedule": "lr_scheduler_type lr_scheduler scheduler",
    "train.warmup_steps, a number of steps": "warmup_ratio warmup warmup_share lr_warmup_steps lr_warmup_steps_ratio",
    "train.final_lr_share": "min_lr min_lr_ratio min_lr_rate",
    "train.betas": "adam_beta1 adam_beta2 adam_betas",
    "train.eps": "adam_epsilon adam_eps",
    "train.max_grad_norm": "clip_grad grad_clip gradient_clipping clip_grad_norm",
    "train.compute_dtype; bfloat16 is its mixed precision": "fp16 float16 half",
    "train.compute_dtype: bfloat16": "bf16 amp mixed_precision autocast",
    "train.compile": "torch_compile use_torch_compile",
    "train.fused_kernels": "use_liger_kernel use_liger use_liger_loss use_fused_kernels",
    "train.save_every": "save_steps save_freq save_interval save_strategy checkpoint_every",
    "train.keep_last": "save_total_limit max_ckpt_to_keep",
    "train.keep_best": "load_best_model_at_end save_best",
    "eval.every": "eval.steps eval.interval eval.freq eval_steps test_freq eval_interval eval_every eval_freq "
    "evaluation_strategy eval_strategy",
    "parallel.shard": "fsdp fsdp_config fsdp_size deepspeed zero_stage dp_shard data_parallel_shard_degree",
    "parallel.replicate": "dp_replicate data_parallel_replicate_degree",
    "parallel.reshard": "reshard_after_forward",
    "parallel.vocabulary": "vocab_parallel loss_parallel enable_loss_parallel disable_loss_parallel",
    "eval.at_start": "val_before_train eval_on_start",
    "eval.path": "eval_path val_path test_file eval_file val_files val_file validation_file test_data eval_data",
    "eval.problems": "eval.limit eval.num_problems eval.num_samples max_eval_samples num_eval_samples",
    "eval.samples_per_prompt": "num_generations_eval num_eval_generations",
    "--resume, an option of `understudy train`": "resume_from_checkpoint resume resume_mode",
}
OTHER_NAMES: Mapping[str, str] = {name: key for key, names in _NAMES.items() for name in names.split()}
"""A name elsewhere -> the key here, and what there is to know about it."""

_NO_KEYS: Mapping[str, str] = {
    "the optimizer is AdamW": "optim optimizer optimizer_type optim_type",
    "a run uses several GPUs when torchrun starts it, one process for each": "n_gpus_per_node nnodes num_gpus gpus nodes",
    "a response ends as the chat template ends a turn, with EOS, or at sampling.max_new_tokens": "stop stop_strings "
    "stop_sequences stop_token_ids stop_words eos_token eos_token_id",
    "samples are drawn without penalties": "repetition_penalty presence_penalty frequency_penalty no_repeat_ngram_size",
    "no code of a model repository is run": "trust_remote_code",
    "each sequence is read whole by one process, as attention by segments takes it; for long ones use parallel.shard and "
    "train.gradient_checkpointing": "context_parallel context_parallel_size context_parallel_degree cp "
    "cp_size sequence_parallel sequence_parallel_size sequence_parallel_degree ulysses_sequence_parallel_size ulysses_degree",
    "layers and experts are divided over processes by parallel.shard, as all weights are": "pipeline_parallel "
    "pipeline_model_parallel_size pipeline_parallel_degree pp_size expert_parallel expert_parallel_size expert_parallel_degree "
    "expert_model_parallel_size ep_size",
    "the choices of a router are not replayed: of the engines only vLLM returns them, and vLLM 0.32 does so with its Model "
    "Runner V2 alone, which its package for CPUs cannot run, so that replay could not be tested. The metric sampler_gap shows "
    "what they differ by, and student.dtype: float32 with rollout.dtype: float32 makes that least": "router_replay "
    "routing_replay rollout_routing_replay use_rollout_routing_replay enable_return_routed_experts",
    "models are not quantised; student.lora trains few weights": "load_in_4bit load_in_8bit quantization_config use_qlora",
    "a run is uploaded with: understudy push RUN OWNER/NAME": "push_to_hub hub_model_id hub_strategy",
}
NO_KEYS: Mapping[str, str] = {name: instead for instead, names in _NO_KEYS.items() for name in names.split()}
"""A name elsewhere of what no key sets here -> what holds instead."""

_TYPES: Mapping[str, str] = {
    "hub": "huggingface hf datasets dataset",
    "file": "json csv parquet arrow files",
    "hf": "transformers huggingface",
    "local": "transformers huggingface hf model",
    "http": "vllm sglang api",
    "chat": "openai api llm",
    "gkd": "gkdtrainer distillationtrainer distillation kd jsd generalized_kd on_policy_distillation",
    "opd": "reverse_kl minillm policy_gradient",
    "topk": "forward_kl top_k",
    "grpo": "grpotrainer grpo_trainer rl ppo rloo reinforce",
    "sft": "sfttrainer supervised imitation cross_entropy",
}
OTHER_TYPES: Mapping[str, tuple[str, ...]] = {
    name: tuple(kind for kind, names in _TYPES.items() if name in names.split())
    for name in {name for names in _TYPES.values() for name in names.split()}
}
"""A name elsewhere -> types of sections here, of which a section has one."""
