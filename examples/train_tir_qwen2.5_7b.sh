#!/usr/bin/env bash
# Tool-integrated reasoning with sequence-level ALP on Qwen2.5-7B (base): Table 3 of arXiv
# 2603.19470, the method that is best there (50.53 on average). 8 GPUs: 4 serve, 4 learn; programs
# run on CPUs.
#
# We have not run this script on GPUs. The comment behind each flag says where its value comes from:
# "paper", with the section; "release", the authors' code (amazon-science/
# adaptive-layerwise-perturbation on GitHub), with the section that mentions the value, if any (our
# copy of the paper's text lacks most of its numbers); "verl", a default of the framework that both
# used; "ours", none of these.
#
# Start the services first, on this or on other hosts, with the same three keys exported:
#
#   export MODEL=Qwen/Qwen2.5-7B
#   export OPENRLHF_ALP_ROLLOUT_API_KEY=$(openssl rand -hex 16)
#   export OPENRLHF_ALP_ROLLOUT_ADMIN_KEY=$(openssl rand -hex 16)
#   export OPENRLHF_ALP_TOOL_API_KEY=$(openssl rand -hex 16)
#   python -m services.tool --port 8090 &
#   for gpu in 0 1 2 3; do
#     CUDA_VISIBLE_DEVICES=$gpu python -m services.rollout --model "$MODEL" --port 800$gpu \
#       --max-model-len 24000 --max-num-seqs 256 &
#   done
#   CUDA_VISIBLE_DEVICES=4,5,6,7 bash examples/train_tir_qwen2.5_7b.sh
#
# Arguments of this script go to the trainer after its own flags, so that the last one wins:
# `--alp.method seq-bypass` trains without noise, everything else being equal.

set -euo pipefail

: "${OPENRLHF_ALP_ROLLOUT_API_KEY:?export the key that the rollout services were started with}"
: "${OPENRLHF_ALP_ROLLOUT_ADMIN_KEY:?export the admin key of the rollout services}"
: "${OPENRLHF_ALP_TOOL_API_KEY:?export the key that the tool service was started with}"

PYTHON=${PYTHON:-python}
MODEL=${MODEL:-Qwen/Qwen2.5-7B}
ROLLOUT_URLS=${ROLLOUT_URLS:-$(printf 'http://127.0.0.1:%d ' 8000 8001 8002 8003)}
TOOL_URLS=${TOOL_URLS:-http://127.0.0.1:8090}
LEARNER_GPUS=${LEARNER_GPUS:-4}
RUN=${RUN:-runs/tir_qwen2.5_7b}
DATA=${DATA:-$RUN/data/prompts.jsonl}

# Paper, 4.1 and appendix E: MATH levels 3 to 5 of SimpleRL, DeepScaleR and rStar2-Agent. The only
# row of the third that the release shows comes from DAPO-Math; give its own file when you have it.
SIMPLERL=hkust-nlp/SimpleRL-Zoo-Data:simplelr_qwen_level3to5/train.parquet
DEEPSCALER=agentica-org/DeepScaleR-Preview-Dataset
RSTAR2=open-r1/DAPO-Math-17k-Processed:en/train-00000-of-00001.parquet
SOURCES=${SOURCES:-$SIMPLERL $DEEPSCALER $RSTAR2}

PROMPT_TOKENS=4096    # release: length at the start
EPISODE_TOKENS=24000  # release: 16000 of history and 8000 of a last turn
TURN_TOKENS=8000      # release; 4.1, appendix E: maximum response length, here of a turn
PROMPTS=128           # release; 4.1, appendix E: rollout batch size
SAMPLES=16            # release: episodes per prompt

if [[ ! -f $DATA ]]; then
  read -r -a sources <<< "$SOURCES"
  prepare=(
    --from "${sources[@]}"
    --to "$DATA"
    --template base-tir                    # ours: plain text for a base model; the
    # release uses a chat template, which is chat-tir with --data.apply_chat_template below
    --tokenizer "$MODEL"
    --max-prompt-tokens "$PROMPT_TOKENS"   # release
  )
  "$PYTHON" -m openrlhf_alp.cli.main prepare-data "${prepare[@]}"
fi

mkdir -p "$RUN"
read -r -a rollout_urls <<< "$ROLLOUT_URLS"
read -r -a tool_urls <<< "$TOOL_URLS"

data=(
  --data.prompt_dataset "$DATA"
  --data.input_key input                   # ours: the fields that prepare-data writes
  --data.label_key label                   # ours
  --data.max_len "$EPISODE_TOKENS"
  --reward.remote_url math-verify          # paper, 3.1.1 (4.1 keeps the set-up): 1 or 0
)
rollout=(
  --rollout.service_urls "${rollout_urls[@]}"
  --rollout.ready_timeout_s 900            # ours: vLLM loads and compiles
  --rollout.request_timeout_s 1800         # ours: one turn, waiting not included
  --rollout.batch_size "$PROMPTS"
  --rollout.n_samples_per_prompt "$SAMPLES"
  --rollout.max_new_tokens $((EPISODE_TOKENS - PROMPT_TOKENS))  # all turns and outputs together
  --rollout.micro_batch_size 4             # ours
  --rollout.temperature 1.0                # release
  --rollout.top_p 1.0                      # required: mu must be the whole distribution
)
tools=(
  --tool.service_urls "${tool_urls[@]}"
  --tool.timeout_s 3                       # release: run_timeout of one program
  --tir.max_tool_turns 5                   # release; 4.1, appendix E
  --tir.max_tokens_per_turn "$TURN_TOKENS"
  --tir.max_output_chars 512               # release: head and tail of what was printed
  --tir.void trajectory                    # release; appendix E: void turns are masked in the loss
  --tir.template plain                     # goes with --template base-tir
)
alp=(
  --alp.enable                             # paper, 2.2
  --alp.method seq-alp                     # paper, Table 3, Remark 1: for many turns
  --alp.sigma vector                       # paper, 2.2 (the release has one number per layer)
  --alp.sigma_scale relative               # ours: sigma in units of each layer's hidden states
  --alp.sigma0 auto                        # ours: the release's 1e-6 is lost in bfloat16
  --alp.lr 5e-4                            # release; appendix E.1 finds little dependence on it
  --alp.layers all                         # paper, Table 4
  --alp.clip_low_high 0.5 3.0              # release; appendix E
  --alp.dual_clip 3.0                      # release; appendix E, single-turn details: 10
)
loss=(
  --algo.advantage.estimator group_norm    # paper, 2.1: the group advantage of GRPO
  --actor.loss_agg_mode token-mean         # release, per micro-batch; here over the whole batch
  --algo.kl.init_coef 0                    # release: no KL term, hence no reference model
  --actor.entropy_coef 0                   # release; 0 logs the entropy
)
optimizer=(
  --actor.adam.lr 1e-6                     # release
  --actor.adam.weight_decay 0.01           # verl; never on sigma
  --actor.adam.betas 0.9 0.99              # release
  --actor.lr_scheduler constant            # verl; OpenRLHF's default is a cosine
  --actor.lr_warmup_ratio 0.0              # verl
  --actor.max_norm 1.0                     # release: gradient norm
  --train.batch_size $((PROMPTS * SAMPLES / 4))  # release; 4.1: 32 prompts an update
  --train.max_epochs 1                     # release: each episode is used once
  --train.num_episodes 100                 # release: passes over the prompts
)
# Memory of a learner GPU in GB, by arithmetic: 7.6e9 parameters on 4 GPUs, a micro-batch of 24,000
# tokens (the longest episode must fit), a vocabulary of 152,064.
#
#   weights and gradients   ZeRO-3, bf16: 4 bytes a parameter over 4 GPUs                  7.6
#   gathered layers         one in use, the next on its way, embeddings                     3
#   Adam and fp32 weights   12 bytes a parameter over 4 GPUs, offloaded to 91 GB of host    0
#   logits                  fp32, their gradient, and that of the bf16 ones: 10 bytes      36.5
#                           a token and word
#   activations             inputs of 28 checkpointed layers, and one layer                 8
#                                                                                     sum  55
#
# Without offload ZeRO-3 needs 78 (30.4 of states), which leaves an 80 GB GPU no room, and ZeRO-2 86
# (whole weights, 15.2, and 14 bytes a parameter over 4 GPUs, 26.6).
machine=(
  --actor.model_name_or_path "$MODEL"      # paper, 4.1: zero RL from the base model
  --actor.num_gpus_per_node "$LEARNER_GPUS"
  --actor.gradient_checkpointing_enable    # ours: episodes are long
  --ds.zero_stage 3                        # release: FSDP with offload, the counterpart
  --ds.adam_offload                        # release; see the arithmetic above
  --ds.param_dtype bf16                    # release: bf16 compute, fp32 master weights
  --train.dynamic_batch_enable             # release: micro-batches by tokens, packed
  --train.max_tokens_per_gpu "$EPISODE_TOKENS"  # ours: the longest episode must fit
)
output=(
  --ckpt.output_dir "$RUN/model"
  --ckpt.path "$RUN/checkpoints"
  --ckpt.save_steps 10                     # release
  --logger.metrics_jsonl "$RUN/metrics.jsonl"
  --logger.tensorboard_dir "$RUN/tensorboard"
)

# OpenRLHF has no flags for two things that the release has and leaves off: sampling more prompts
# than are trained on, and rejecting groups by their void turns.
exec "$PYTHON" -m openrlhf_alp.cli.train_ppo_ray \
  "${machine[@]}" "${data[@]}" "${rollout[@]}" "${tools[@]}" "${alp[@]}" "${loss[@]}" \
  "${optimizer[@]}" "${output[@]}" "$@"
