#!/usr/bin/env bash
# Single-turn mathematics with token-level ALP on Qwen2.5-Math-1.5B: Table 1 of arXiv 2603.19470,
# the method that is best there (37.87 on average). 8 GPUs: 4 serve, 4 learn.
#
# We have not run this script on GPUs. The comment behind each flag says where its value comes from:
# "paper", with the section; "release", the authors' code (amazon-science/
# adaptive-layerwise-perturbation on GitHub), with the section that mentions the value, if any (our
# copy of the paper's text lacks most of its numbers); "verl", a default of the framework that both
# used; "ours", none of these.
#
# Start the rollout services first, on this or on other hosts, with the same two keys exported:
#
#   export MODEL=Qwen/Qwen2.5-Math-1.5B
#   export OPENRLHF_ALP_ROLLOUT_API_KEY=$(openssl rand -hex 16)
#   export OPENRLHF_ALP_ROLLOUT_ADMIN_KEY=$(openssl rand -hex 16)
#   for gpu in 0 1 2 3; do
#     CUDA_VISIBLE_DEVICES=$gpu python -m services.rollout --model "$MODEL" --port 800$gpu \
#       --max-model-len 4096 --max-num-seqs 256 &
#   done
#   CUDA_VISIBLE_DEVICES=4,5,6,7 bash examples/train_single_turn_qwen2.5_math_1.5b.sh
#
# Arguments of this script go to the trainer after its own flags, so that the last one wins:
# `--alp.method token-bypass` trains without noise, everything else being equal.

set -euo pipefail

: "${OPENRLHF_ALP_ROLLOUT_API_KEY:?export the key that the rollout services were started with}"
: "${OPENRLHF_ALP_ROLLOUT_ADMIN_KEY:?export the admin key of the rollout services}"

PYTHON=${PYTHON:-python}
MODEL=${MODEL:-Qwen/Qwen2.5-Math-1.5B}
ROLLOUT_URLS=${ROLLOUT_URLS:-$(printf 'http://127.0.0.1:%d ' 8000 8001 8002 8003)}
LEARNER_GPUS=${LEARNER_GPUS:-4}
RUN=${RUN:-runs/single_turn_qwen2.5_math_1.5b}
DATA=${DATA:-$RUN/data/prompts.jsonl}

# Paper, 3.1.1 and appendix E: the mathematical part of Guru RL-92k, merged with an OpenR1 subset
# that is filtered by the average score of its solutions and deduplicated by problem. prepare-data
# deduplicates; it does not filter by score: filter that set first and add the file here.
SOURCES=${SOURCES:-LLM360/guru-RL-92k:train/math__combined_54.4k.parquet}

PROMPT_TOKENS=2048    # paper, appendix E: max_prompt_length
RESPONSE_TOKENS=2048  # paper, appendix E: max_response_length
PROMPTS=512           # paper, appendix E: prompts of a step
SAMPLES=8             # release; 3.1.1, appendix E: responses per prompt

if [[ ! -f $DATA ]]; then
  read -r -a sources <<< "$SOURCES"
  prepare=(
    --from "${sources[@]}"
    --to "$DATA"
    --template chat-math                   # paper, appendix E: system and user, asks for \boxed{}
    --tokenizer "$MODEL"
    --max-prompt-tokens "$PROMPT_TOKENS"   # paper, appendix E
  )
  "$PYTHON" -m openrlhf_alp.cli.main prepare-data "${prepare[@]}"
fi

mkdir -p "$RUN"
read -r -a rollout_urls <<< "$ROLLOUT_URLS"

data=(
  --data.prompt_dataset "$DATA"
  --data.input_key input                   # ours: the fields that prepare-data writes
  --data.label_key label                   # ours
  --data.apply_chat_template               # goes with --template chat-math
  --data.max_len $((PROMPT_TOKENS + RESPONSE_TOKENS))  # also all that the model has positions for
  --reward.remote_url math-verify          # paper, appendix E: math-verify, 1 or 0
)
rollout=(
  --rollout.service_urls "${rollout_urls[@]}"
  --rollout.ready_timeout_s 600            # ours: vLLM loads and compiles
  --rollout.request_timeout_s 1200         # ours: one answer, waiting not included
  --rollout.batch_size "$PROMPTS"
  --rollout.n_samples_per_prompt "$SAMPLES"
  --rollout.max_new_tokens "$RESPONSE_TOKENS"
  --rollout.micro_batch_size 8             # release
  --rollout.temperature 1.0                # release; 3.1.1
  --rollout.top_p 1.0                      # required: mu must be the whole distribution
)
alp=(
  --alp.enable                             # paper, 2.2
  --alp.method token-alp                   # paper, Table 1 and Remark 1: token level for one turn
  --alp.sigma vector                       # paper, 2.2 (the release has one number per layer)
  --alp.sigma_scale relative               # ours: sigma in units of each layer's hidden states
  --alp.sigma0 auto                        # ours: the release's absolute 0.02 is more than the
  # embeddings themselves (rms 0.015); appendix E.1 finds little dependence on it
  --alp.lr 5e-4                            # ours: the release's 1e-2 is a random walk for a vector
  --alp.layers all                         # paper, 5.1: better than any part of the layers
  --alp.clip_low_high 0.2 0.28             # release; appendix E, two upper bounds
  --alp.dual_clip 10.0                     # paper, appendix E, single-turn details
)
loss=(
  --algo.advantage.estimator group_norm    # paper, 2.1: the group advantage of GRPO
  --actor.loss_agg_mode token-mean         # release, per micro-batch; here over the whole batch
  --algo.kl.use_loss                       # paper, appendix E: a KL loss
  --algo.kl.init_coef 0.001                # release; appendix E
  --algo.kl.estimator k3                   # release: low_var_kl
  --actor.entropy_coef 0                   # release; appendix E; 0 logs the entropy
)
optimizer=(
  --actor.adam.lr 1e-6                     # release; 3.1.1, appendix E
  --actor.adam.weight_decay 0.01           # verl; appendix E; never on sigma
  --actor.adam.betas 0.9 0.999             # verl
  --actor.lr_scheduler constant            # verl; OpenRLHF's default is a cosine
  --actor.lr_warmup_ratio 0.0              # verl
  --actor.max_norm 1.0                     # verl: gradient norm
  --train.batch_size $((PROMPTS * SAMPLES / 16))  # release; 3.1.1: 16 updates a step
  --train.micro_batch_size 8               # release
  --train.max_epochs 1                     # release: each answer is used once
  --train.num_episodes 50                  # release: passes over the prompts
)
machine=(
  --actor.model_name_or_path "$MODEL"      # paper, 3.1.1: the base model of Qwen2.5-Math-1.5B
  --actor.num_gpus_per_node "$LEARNER_GPUS"
  --ref.num_gpus_per_node "$LEARNER_GPUS"  # ours: the KL loss needs the reference model
  --train.colocate_actor_ref               # ours: on the same GPUs
  --actor.gradient_checkpointing_enable    # release
  --ds.zero_stage 2                        # ours; the paper uses FSDP (appendix E)
  --ds.param_dtype bf16                    # release
  --ds.packing_samples                     # ours: no padding; the noise does not depend on it
)
output=(
  --ckpt.output_dir "$RUN/model"
  --ckpt.path "$RUN/checkpoints"
  --ckpt.save_steps 20                     # release
  --logger.metrics_jsonl "$RUN/metrics.jsonl"
  --logger.tensorboard_dir "$RUN/tensorboard"
)

exec "$PYTHON" -m openrlhf_alp.cli.train_ppo_ray \
  "${machine[@]}" "${data[@]}" "${rollout[@]}" "${alp[@]}" "${loss[@]}" "${optimizer[@]}" \
  "${output[@]}" "$@"
