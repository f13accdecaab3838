#!/usr/bin/env bash
# LLaMA-Factory 0.9.5 cuts rows that are longer than cutoff_len, answers at their end. With most templates an answer that was
# cut has no end-of-text token, so the model does not learn to stop there. With the templates that count as "efficient_eos"
# (GLM-4.5 and 4.7 MoE, GLM-4, gpt-oss, Ling, Gemma 2, Falcon, Solar …) the end-of-text token is appended after the cut,
# and it is a label: the model is trained to stop in the middle of a sentence, at about cutoff_len tokens.
# Prompts are cut at their end as well, for every template: what goes is the question's last words and the header that
# opens the answer, which stands there in every prompt when the model is used. Nothing is logged for either.
# Follows: long answers of such a model break off, the more so the shorter cutoff_len was. Drop rows that are too long
# before training. (transformers 5.6.0, the newest that it takes; torchaudio, for sound alone, is left out here.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-deps llamafactory==0.9.5
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.6.0 datasets==4.0.0 peft==0.18.1 \
    accelerate==1.11.0 trl==0.24.0 omegaconf numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
import types
from importlib.machinery import ModuleSpec
from importlib.metadata import version

sound = types.ModuleType("torchaudio")  # a module for sound, which is imported but not needed for texts
sound.__spec__ = ModuleSpec("torchaudio", None)
sys.modules["torchaudio"] = sound

from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
from llamafactory.data.template import TEMPLATES, get_template_and_fix_tokenizer
from llamafactory.hparams import DataArguments
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

print({name: version(name) for name in ("llamafactory", "transformers", "torch")})
questions, answers = ([f"{kind}{number}" for number in range(200)] for kind in ("ask", "say"))


def processed(template, question_words, answer_words):
    """The words of a row that LLaMA-Factory makes with cutoff_len=64, and those of them that are labels."""
    words = {word: number for number, word in enumerate(["[PAD]", "[END]", "[OTHER]", *questions, *answers])}
    raw = Tokenizer(models.WordLevel(words, unk_token="[OTHER]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", eos_token="[END]", unk_token="[OTHER]")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(text) for text in ("<|assistant|>", "<|im_start|>", "<|user|>")]}
    )
    settings = DataArguments(template=template, cutoff_len=64)
    fixed = get_template_and_fix_tokenizer(tokenizer, settings)
    processor = SupervisedDatasetProcessor(template=fixed, tokenizer=tokenizer, processor=None, data_args=settings)
    rows = processor.preprocess_dataset({
        "_prompt": [[{"role": "user", "content": " ".join(questions[:question_words])}]],
        "_response": [[{"role": "assistant", "content": " ".join(answers[:answer_words])}]],
        "_system": [None], "_tools": [None], "_images": [None], "_videos": [None], "_audios": [None],
    })
    ids, labels = rows["input_ids"][0], rows["labels"][0]
    assert len(ids) <= 64
    end = tokenizer.eos_token
    read = tokenizer.convert_ids_to_tokens
    return read(ids), read([label for label in labels if label != -100]), end


efficient = [name for name, template in TEMPLATES.items() if template.efficient_eos]
print("templates with efficient_eos:", ", ".join(efficient))
for template in ("glm4_moe", "gpt_oss", "bailing_v2", "gemma2", "qwen", "llama3"):
    _, short, end = processed(template, 5, 20)
    _, labels, end = processed(template, 5, 150)
    print(f"{template}: an answer of 150 words is cut, the last labels are {labels[-3:]}; end of text is {end}")
    assert short[-1] == end or template in ("qwen", "llama3"), short[-3:]
    assert (labels[-1] == end) is (template in efficient) and not any("say149" in label for label in labels)
for template, header in (("glm4_moe", "<|assistant|>"), ("qwen", "<|im_start|>")):
    full, _, _ = processed(template, 5, 5)
    cut, labels, _ = processed(template, 150, 5)
    before = [row[: row.index("say0")] for row in (full, cut)]
    told = [(row.count(header), row[-4:]) for row in before]
    print(f"{template}: before a short answer {header} stands {told[0][0]} times, and there ends {told[0][1]}")
    print(f"{template}: with a question of 150 words it stands {told[1][0]} times, and there ends {told[1][1]}")
    assert told[1][0] == told[0][0] - 1 and any("ask" in word for word in told[1][1])
print("seen: cut answers end with the end of text, cut prompts without the answer's header")
PYTHON
