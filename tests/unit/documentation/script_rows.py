"""Every script that a page shows, as a test runs it: the same program, cut to one family, one shape, few inputs.

`{place}` is a folder with a tiny model, a few of the quickstart's rows, and a recipe of the two; `{run}` a run of it.
Others are second environments: see `environments.py`. A row that names a test is run there.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ROWS", "Row"]


@dataclass(frozen=True)
class Row:
    """A script, its arguments, what its output must match and which files it must leave; or the test that runs it."""

    script: str
    arguments: str = ""
    says: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    test: str = ""


KILLS = "tests/faults/test_kill_points.py"
TRAIN, HELD_OUT = "{place}/train.jsonl", "{place}/held-out.jsonl"
ROWS = (
    Row("card_day.py", test="tests/unit/test_card_day.py::test_a_piece_that_fails_is_a_line_and_the_next_one_runs"),
    Row("rehearse_card.py", test="tests/card/test_rehearsal.py::test_a_recipe_is_rehearsed"),
    Row("rehearse_card.py", test="tests/card/test_rehearsal.py::test_a_load_alone_is_rehearsed"),
    Row(
        "rehearsed_loads.py",
        test="tests/unit/plan/test_rehearsed_loads.py::test_loads_stand_beside_the_plans_of_both_stacks",
    ),
    Row(
        "benchmarks/tokenise.py",
        "{place}/train.jsonl --repeats 1",
        (r"^train\.jsonl: 24 rows, [\d.]+ s, [\d,]+ rows/s$",),
    ),
    Row("benchmarks/data_memory.py", "{place}/rows --rows 300", (r"^ +[\d.]+ s +\d+ MiB  ended$",)),
    Row("faults/corruptions.py", "--count 20", (r"^20 of 20 corruptions seen, 0 whole checkpoints refused$",)),
    Row(
        "faults/fuzz.py",
        'jsonl "checkpoint manifest" --inputs 5',
        (r"^jsonl +5 inputs .* 0 failures$", r"^checkpoint manifest +5 inputs .* 0 failures$"),
    ),
    Row(
        "faults/kill_points.py",
        test=f"{KILLS}::test_kills_and_disk_errors_are_survived_wherever_something_is_written",
    ),
    Row("faults/kill_points.py", test=f"{KILLS}::test_a_whole_run_is_survived"),
    Row("faults/random_kills.py", "--kills 1", (r"^[1-9]\d* kills over 1 runs, 1 of 1 ended as if never killed$",)),
    Row("faults/resume_matrix.py", '"not packed"', (r"^equal +not packed$", r"^1 of 1 configurations resume bit")),
    Row(
        "faults/save_overhead.py",
        "--repeats 1 --sizes 1 --folder {place}",
        (r"^ +1 MiB: plain [\d.]+ s \(.*synced [\d.]+ s \(.*safe [\d.]+ s \(",),
    ),
    Row(
        "benchmarks/block_scales.py",
        f"{{place}}/tiny {HELD_OUT} --held-out 4",
        (r": 4 examples, \d+ tokens, 18 parts$", r"^one a row +[\d.]+% +1\.000 ", r"^every row .*100\.00%"),
    ),
    Row(
        "benchmarks/coverage.py",
        "qwen3_moe",
        (
            r"^qwen3_moe +\| +6/6 +6/6 +3/3 \| +0/6 ",
            r"reached: families 1, int8 1, experts 1, routers 1, stock_int8 0,",
        ),
    ),
    Row(
        "benchmarks/digits.py",
        "--rows 2 --inputs 1024 --outputs 512 --repeats 1",
        (r"^ +rows +digits ms", r"^( +2 +[\d.]+ +[\d.]+ +[\d.]+× |digits\.py: too small a weight)"),
    ),
    Row(
        "benchmarks/row_bits.py",
        "--heights 20 --shapes 24x3 --repeats 1",
        (r"^product +results ", r"^24x3 x W +\d+ +\d+ +\d+ +[\d.]+( +[\d.]+×){2}$", r"^24x3 x Wt "),
    ),
    Row(
        "benchmarks/experts.py",
        "--scaling E4-H64-I32-K2-T16 --repeats 1 --threads 1 --peers {peers} --json {place}/scaling.json "
        "--plot {place}/scaling.svg",
        (r"^tokens 64: ours [\d.]+ s \([\d.]+–[\d.]+\), stock PEFT, grouped_mm ", r"^experts 2: ", r"^rank 64: "),
        ("scaling.json", "scaling.svg"),
    ),
    Row(
        "benchmarks/experts.py",
        "--shapes E8-H64-I32-K2-T16 --repeats 1 --threads 1 --sgemm 256 --no-memory --only ours --peers {peers} "
        "--json {place}/layers.json --plot {place}/layers.svg",
        (
            r"^E8-H64-I32-K2-T16 R=16",
            r"^ours +[\d.]+ \(",
            r"^stock PEFT, grouped_mm +[\d.]+ \(",
            r"^  ours against stock",
        ),
        ("layers.json", "layers.svg"),
    ),
    Row(
        "benchmarks/generate.py",
        "--checkpoints {place}/tiny --batches 1 --new 4 --prompt 8 --prefill 16 --repeats 1 --threads 1 --within 1 "
        '--only "ours, fp32" "ours, bf16" "stock merged, fp32" --peers {peers} --json {place}/writing.json',
        (
            r"/tiny: tokens a second, median",
            r"^write, batch 1$",
            r"^  ours, bf16 +[\d.]+ \(",
            r"^  stock merged, fp32 +[\d.]+ \(",
            r"against stock's best: [\d.]+×$",
        ),
        ("writing.json",),
    ),
    Row(
        "benchmarks/large_step.py",
        "{shape} --tokens 32 --out {place}/step.json",
        (r'"expert_stacks_adapted": \[\s+4,\s+4\s+\]', r'"streamed_layers": [1-9]', r'"anonymous_peak_gib": \d'),
        ("step.json",),
    ),
    Row(
        "benchmarks/linears.py",
        f"{{place}}/tiny {HELD_OUT} --held-out 4 --tokens 64 --repeats 1",
        (r"a step of 64 tokens, 1 rounds", r"^int8 +[+-][\d.]+%", r"^bnb +[+-][\d.]+%", r"^none +[+-][\d.]+%"),
    ),
    Row(
        "benchmarks/load.py",
        "{place}/load --gigabytes 0.02 --experts 4",
        (
            r"^quantize .* s of CPU\)",
            r"^bf16_load_bfloat16_cold ",
            r"^int8_load_float32_warm ",
            r"^warm load to float32",
        ),
        ("load/config.json", "load-int8/config.json"),
    ),
    Row(
        "benchmarks/extraction_data.py",
        "{place}/extraction",
        (r"extraction\.train\.jsonl: \d{4} examples$", r"extraction\.validation\.jsonl: \d{3} examples$"),
        ("extraction/extraction.train.jsonl", "extraction/extraction.validation.jsonl"),
    ),
    Row(
        "benchmarks/mtp.py",
        "{place}/recipe.yaml data.max_samples=16 training.num_train_epochs=1 mtp.own_answers=4 mtp.stage=with "
        "eval.max_new_tokens=4 --tokens 4 --prompts 2 --decoded 1",
        (
            r"^data alone +1",
            r"^copied +1 +\d\.\d\d +[\d.]+%",
            r"^re-aligned +3 ",
            r"^decoded 1 prompts, 3 drafts: .*same text: True$",
        ),
    ),
    Row(
        "benchmarks/mtp.py",
        "{run}/recipe.yaml --run {run} mtp.own_answers=2 --tokens 4 --prompts 2 --decoded 0 --seeds 2",
        (r"^mean of 2 seeds", r"^stale +1 +\d\.\d\d ± \d\.\d\d$", r"^copied +3 +\d\.\d\d ± \d\.\d\d$"),
    ),
    Row(
        "benchmarks/mtp_overhead.py",
        "{place}/recipe.yaml mtp.own_answers=4 mtp.stage=with --steps 1 --repeats 1",
        (
            r"^round 1: steps with a head [\d.]+ s",
            r"^round 1: own answers [\d.]+ s",
            r"^processor: 1 steps [\d.]+ s without, [\d.]+ s with a head of depth 1, own answers [\d.]+ s; ",
        ),
    ),
    Row(
        "benchmarks/plan_full_size.py",
        "--model olmoe --only 3 --table {place}/full.md",
        (r"^\| allenai/OLMoE\S+ \| 1024 \| 16 \| kept \| 4 of 16 \|.* \| [+-]0\.00% \|$",),
        ("full.md",),
    ),
    Row(
        "benchmarks/plan_memory.py",
        "--only 22 --table {place}/memory.md",
        (r"^ 22 qwen3_moe +256 r 16, adamw_torch, recomputed +planned +\d+\.\d measured +\d+\.\d ",),
        ("memory.md",),
    ),
    Row(
        "benchmarks/preferences.py",
        test="tests/unit/test_benchmarks.py::test_preferences_are_judged_beside_the_adapter_that_they_start_from",
    ),
    Row(
        "benchmarks/preferences_speed.py",
        "--checkpoints {place}/tiny --jobs dpo rollouts --examples 8 --batch 4 --prompts 2 --generations 2 --new 4 "
        '--workers "ours fp32" "stock fp32" --activations kept --repeats 1 --threads 1 --no-memory '
        "--json {place}/pairs.json",
        (
            r"/tiny, dpo: tokens a second, median",
            r"^  ours fp32, kept +[\d.]+ \(.* held-out loss 0\.\d+$",
            r"^  stock fp32, kept +[\d.]+ \(",
            r"/tiny, rollouts: tokens a second, median",
            r"^  ours, best, against stock's best: [\d.]+×$",
        ),
        ("pairs.json",),
    ),
    Row(
        "benchmarks/quantization_error.py",
        f"{{place}}/tiny {TRAIN} {HELD_OUT} --calibration 4 --held-out 4 --four-bit --bits 6 --linears none",
        (
            r": calibrated on 4 examples",
            r"^int8\+gptq +[\d.]+ ",
            r"^compensated / rounded, parts: int8 0\.",
            r"layers\.2 ",
        ),
    ),
    Row(
        "benchmarks/sizes.py",
        says=(r"^allenai/OLMoE-1B-7B\S+ +6\.92 +6\.9 ", r"^openai/gpt-oss-20b .* 25\.03% "),
    ),
    Row(
        "benchmarks/streaming.py",
        "{place}/stream --layers 2 --smaller 64 --tokens 32 --rounds 1 --out {place}",
        (
            r'"what": "2 layers of Qwen3-30B-A3B\'s shape / 64, 32 tokens',
            r'(?s)("same_bits_as_resident": true.*?){5}',
        ),
        ("streaming.json", "streaming.svg"),
    ),
    Row(
        "benchmarks/token_groups.py",
        "{place}/recipe.yaml data.max_samples=16 --positions 256 --seeds 2 --batch 128",
        (r"^before: held-out loss [\d.]+; 256 positions an arm$", r"^67% of the positions on groups: held-out loss "),
    ),
    Row(
        "benchmarks/train.py",
        f"--checkpoints {{place}}/tiny --train {TRAIN} --validation {HELD_OUT} --examples 8 --length 128 --repeats 1 "
        '--threads 1 --no-memory --only ours "stock TRL + PEFT" --profile --peers {peers} --json {place}/train.json '
        "--plot {place}/train.svg",
        (
            r": 8 examples, \d+ tokens without padding",
            r"^ours +[\d.]+ \(",
            r"^stock TRL \+ PEFT +[\d.]+ \(",
            r" apart$",
            r"processor time by operator: \d+% in matrix products$",
        ),
        ("train.json", "train.svg"),
    ),
    Row(
        "benchmarks/triton_kernels.py",
        test="tests/parity/test_gpu_check.py::test_kernels_compile_for_cards_that_are_not_here",
    ),
    Row("gpu_check.py", test="tests/parity/test_gpu_check.py::test_with_torch_and_triton_alone_it_checks_parity"),
    Row(
        "make_qwen3_30b_shape.py",
        "{place}/shape --layers 1 --smaller 64 --dtype bfloat16",
        (r"^4/4 shards", r" GB in .*/shape$"),
        ("shape/model.safetensors.index.json", "shape/config.json"),
    ),
    Row(
        "parity/layouts.py",
        "qwen3_moe",
        (r"^\{'peft': 1, 'per-expert': 1, 'merged': 1, 'merged-int8': 1, 'gguf': 1\}$",),
    ),
    Row(
        "parity/llama_cpp.py",
        "qwen3_moe --venv {llama}",
        (
            r"^\| qwen3_moe \| (\S+e-0\d|0\.0e\+00) \| (\S+e-0\d|0\.0e\+00) \| \S+e-0\d \| ",
            r"^1 of 1 families run, 1 with a GGUF LoRA; .*: none$",
        ),
    ),
    Row(
        "parity/gguf_source.py",
        "qwen3_moe --venv {llama}",
        (
            r"^\| qwen3_moe \| qwen3moe \| (\d+) \| \1 \| 0e\+00 \| 0e\+00 \|$",
            r"^1 of 1 block types are worth what ggml's C code says, to the bit; not read: none$",
            r"^1 of 1 families come back, 1 of 26 architectures; .*: none$",
        ),
    ),
    Row("parity/merged_gguf.py", test="tests/parity/test_ready_to_run.py::test_a_merged_gguf_file_is_judged"),
    Row("parity/merged_checkpoints.py", test="tests/parity/test_ready_to_run.py::test_merged_checkpoints_are_judged"),
    Row("parity/format_table.py", test="tests/parity/test_format_table.py::test_a_checkpoint_is_right_or_named"),
    Row(
        "parity/method_families.py",
        "qwen3_moe --steps 2 --method orpo",
        (
            r"^ok +qwen3_moe +21/21 moved, first step off by \S+, balance \d",
            r"^1 of 1 families: every default adapter moved",
        ),
    ),
    Row(
        "parity/job_families.py",
        "qwen3_moe",
        (r"^ok +qwen3_moe +(\d+)/\1 moved, 3 steps, held-out loss \S+ to \S+", r"^1 of 1 families: .*by a whole job$"),
    ),
    Row(
        "parity/varied_settings.py",
        "qwen3_moe glm_moe_dsa --seeds 1",
        (r"^qwen3_moe int\d \{.*: the same$", r"^2 of 2 checkpoints of 2 families$"),
    ),
    Row(
        "parity/token_families.py",
        "qwen3_moe",
        (r"^ok +qwen3_moe +3/3 rows moved; ", r"^1 of 1 families take new tokens, 0 refused by name$"),
    ),
    Row(
        "parity/grpo_families.py",
        "qwen3_moe --steps 1 --method rloo",
        (
            r"^ok +qwen3_moe +21/21 moved, first distance \S+, first reward \d",
            r"^1 of 1 families: every default adapter moved",
        ),
    ),
    Row(
        "parity/foreign_adapters.py",
        "qwen3_moe",
        (r"^qwen3_moe: fused 72 of 72, linears 72 of 72, with a hole 71 of 72$", r"^1 of 1 families, 0 refused$"),
    ),
    Row(
        "parity/foreign_toolkits.py",
        test="tests/parity/test_foreign_toolkits.py::test_verify_is_judged_by_a_merge_and_a_hole",
    ),
    Row(
        "parity/mtp_families.py",
        "exaone_moe",
        (r"trained, same names; stock drafts the same$", r"^1 families come back"),
    ),
    Row(
        "parity/mtp_greedy.py",
        "{run} --prompts 2 --tokens 4 --drafts 1",
        (r"^run +1 drafts: 2 of 2 texts the same; tau ",),
    ),
    Row(
        "parity/templates.py",
        "trl --only chat_templates/qwen3 --case plain thought --side scripts/parity/template_tokens.json",
        (r"^chat_templates/qwen3 +2 exact ", r"^2 exact; 2 renderable; 2 exact of renderable$"),
    ),
    Row("parity/template_masks.py", "qwen3", (r"^\| qwen3 \| 30, 54 \| right \| 30 \| ", r"^\|  \|  \| TRL \| ")),
    Row("parity/mtp_greedy.py", "--native glm4_moe {place}/native --taught 2", (r"^step 2 of 2: loss \d",)),
    Row("parity/rehearsals.py", "qwen3_moe", (r"^qwen3_moe +rehearsed: ", r"^1 rehearsed of 1 families$")),
    Row("parity/rehearsals.py", "qwen3_moe --card", (r"^qwen3_moe +rehearsed: ", r"^1 rehearsed of 1 families$")),
    Row(
        "parity/stock_families.py",
        "qwen3_moe --venv {stock} --json {place}/families.json",
        (
            r"^\| qwen3_moe \| (\S+e-0\d|0\.0e\+00) \| (\S+e-0\d|0\.0e\+00) \|",
            r"^1 of 1 families within 1e-04 in fp32; over it: none$",
        ),
        ("families.json",),
    ),
    Row(
        "parity/stock_peft.py",
        f"{{run}}/adapter --base {{place}}/tiny --data {HELD_OUT} --venv {{stock}}",
        (r"^ok +environment without onecard +clean", r"^ok +logits, our adapter in stock PEFT ", r"^ok +held-out loss"),
    ),
    Row("parity/streaming.py", "{place}/tiny --steps 2", (r"^tiny: 2 steps, .*, equal; 42 of 42 tensors equal$",)),
    Row(
        "parity/vllm_loader.py",
        "qwen3_moe --python {vllm}",
        (r"^qwen3_moe \{'tensors': 174, .*'stacks': 3", r"^planted fault \{'error': .*nothing for \[11\]"),
    ),
    Row(
        "plan_cards.py",
        "--recipes olmoe-1b-7b --cards rtx-4090 --set training.max_length=1024 --seconds",
        (r"^\| recipe \| need GiB \| 24 GB: 4090 \| plan, s \|$", r"^\| olmoe-1b-7b \| \d+\.\d \| fits, .* \|$"),
    ),
    Row("recipe_headers.py", "{place}/for-a-card.yaml", (r"^for-a-card.yaml: Fits a \d+ GB card \(RTX ",)),
    Row("recipe_reference.py", "{place}/recipe.md", writes=("recipe.md",)),
    Row("record_plans.py", "--check --model olmoe --sample 9", (r"^allenai/OLMoE\S+: 7 steps in \d+ s, the same$",)),
    Row("ten_minutes.py", test="tests/unit/documentation/test_ten_minutes.py::test_from_init_to_push"),
)
