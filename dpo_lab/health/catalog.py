"""The faults that `diagnose` looks for: what one sees, the cause, the cure."""

from typing import Literal, NamedTuple, get_args

FaultName = Literal[
    "loss_stuck_frozen",
    "loss_stuck_tiny_beta",
    "identical_pairs",
    "dropout_on",
    "other_precision",
    "wrong_reference",
    "chosen_logps_fall",
    "length_exploitation",
    "mean_instead_of_sum",
    "truncated_eos",
    "overtraining",
    "reward_hacking",
    "flipped_labels",
    "leaked_pairs",
    "learning_rate_too_high",
    "bfloat16_weights",
    "swapped_columns",
    "prompt_scored",
]


class Fault(NamedTuple):
    """A fault of a training run, each part one or two sentences of plain text."""

    title: str
    """a few words"""
    sees: str
    """what one sees in the curves, the data or the samples"""
    cause: str
    """why"""
    cure: str
    """what to do"""


FAULTS: dict[FaultName, Fault] = {
    "loss_stuck_frozen": Fault(
        "the policy is frozen",
        "The loss stays at log 2, every implicit reward stays at 0, and the weights at the end are "
        "those of the start.",
        "No parameter that matters is trained: requires_grad is False, the optimizer holds another "
        "model's parameters, the loss was detached, or the learning rate is zero.",
        "Check that the parameters of the policy require a gradient, that the optimizer was made "
        "after adapters were added, and that learning_rate is what you meant.",
    ),
    "loss_stuck_tiny_beta": Fault(
        "beta is tiny",
        "The loss stays near log 2 although the log-probs of both sides move by many nats.",
        "The implicit reward is beta times a log-ratio. With a tiny beta even a large log-ratio "
        "makes a small margin, so the loss says nothing and nothing holds the policy back.",
        "Raise beta: 0.1 to 0.5 is usual. Then tune the learning rate again.",
    ),
    "identical_pairs": Fault(
        "chosen and rejected are the same tokens",
        "The log-probs of both sides are equal, and the margin of such a pair is 0 for good.",
        "Both completions were truncated to the same tokens, or the same answer was given twice.",
        "Allow longer completions, and drop the pairs that are still identical.",
    ),
    "dropout_on": Fault(
        "dropout is on",
        "Before the first update the rewards are not 0, and scoring the same pair twice gives two "
        "numbers. Both sides seem less probable than under the reference.",
        "The policy is scored in training mode with dropout, the reference without.",
        "Set every dropout probability to 0, or call model.eval() before training; gradients flow "
        "in eval mode too.",
    ),
    "other_precision": Fault(
        "policy and reference are computed in different precisions",
        "Before the first update the rewards are small but not 0, of either sign from pair to "
        "pair.",
        "The reference was scored in bfloat16 and the policy in float32, or the other way round. "
        "Rounding errors of many tokens add up.",
        "Score the reference in the precision in which the policy is trained.",
    ),
    "wrong_reference": Fault(
        "the reference is another model",
        "Before the first update the rewards are far from 0, the same ones each time.",
        "The reference log-probs belong to other weights than those that the policy begins with: "
        "the model before SFT, an older checkpoint, or other tokens.",
        "Compute the reference log-probs with the very weights that the policy starts from.",
    ),
    "chosen_logps_fall": Fault(
        "the chosen answers lose probability",
        "The margin grows while the log-probs of the chosen answers fall by a large part of what "
        "they were.",
        "The loss sees the difference alone. Where both answers of a pair are alike, or training "
        "is long, it is lowered most easily by pushing both down; the probability goes to texts "
        "that are in no pair.",
        "Train for fewer steps or with a larger beta, add a term with the log-likelihood of the "
        "chosen answers, or use pairs whose answers differ more.",
    ),
    "length_exploitation": Fault(
        "longer answers win",
        "The chosen answer is nearly always the longer one, and sampled answers grow longer.",
        "Length predicts the labels, and the policy learns length before anything else.",
        "Balance the lengths of the pairs, compare policies by a length-controlled win rate, or "
        "use a loss that normalizes by length.",
    ),
    "mean_instead_of_sum": Fault(
        "log-probs are averaged over tokens",
        "The log-prob of an answer does not grow with its length, and is as small as that of one "
        "token.",
        "The log-probs were averaged over tokens. DPO's log-ratio is that of the whole answer, so "
        "they are summed; averaging divides beta by each answer's length.",
        "Sum the log-probs over the tokens of the completion.",
    ),
    "truncated_eos": Fault(
        "answers have lost their end token",
        "Sampled answers run to the length limit, and do so more often than before training.",
        "Answers were truncated, or tokenized without EOS, so no pair shows where an answer ends.",
        "Allow longer completions, drop what does not fit, and end every whole answer with EOS.",
    ),
    "overtraining": Fault(
        "training went on too long",
        "On the training pairs loss and accuracy still improve, while held-out accuracy or reward "
        "falls, or samples repeat themselves (distinct-n falls).",
        "Labels that are seen again and again are learned by heart: with one label per pair the "
        "loss has no minimum, and margins grow without end.",
        "Stop at the best held-out evaluation, take fewer epochs or a smaller learning rate, or "
        "smooth the labels.",
    ),
    "reward_hacking": Fault(
        "the policy exploits the reward",
        "The reward that labels the pairs rises while the true reward, or another judge's, falls.",
        "The reward is a proxy. Far from the reference the policy finds texts that it scores too "
        "high.",
        "Stop at a smaller KL or raise beta, look at samples, and fit the reward to texts of the "
        "policy.",
    ),
    "flipped_labels": Fault(
        "labels are flipped",
        "Pairs contradict one another or the scores that they were made by, or accuracy on pairs "
        "not seen before stays near one half.",
        "Some of the labels are wrong: noisy raters, a bug in a merge, or answers shown in a "
        "random order that was not undone.",
        "Find where the order is lost and relabel; against noise that stays, use label_smoothing "
        'or loss_type="robust".',
    ),
    "leaked_pairs": Fault(
        "evaluation pairs were trained on",
        "Held-out accuracy is far better than accuracy on training pairs that are seen for the "
        "first time.",
        "The same pairs lie in both splits, for instance because duplicates were not removed "
        "before the data was divided.",
        "Remove duplicates first, then divide by prompt, so that no prompt is in both splits.",
    ),
    "learning_rate_too_high": Fault(
        "the learning rate is too high",
        "The loss rises above log 2 and jumps about, and the log-probs of both sides collapse "
        "within the first epoch.",
        "Each step moves the policy so far that what was learned on earlier pairs is destroyed.",
        "Divide the learning rate by ten; about 1e-6 to 5e-5 suits training all weights, ten times "
        "that adapters.",
    ),
    "bfloat16_weights": Fault(
        "bfloat16 weights do not move",
        "Gradients are not 0, but most weights are after training what they were before, to the "
        "bit.",
        "A bfloat16 number has 8 significant bits. An update of less than a few thousandths of a "
        "weight is rounded away.",
        "Keep the trained weights in float32 and compute in bfloat16 by autocast.",
    ),
    "swapped_columns": Fault(
        "chosen and rejected are swapped",
        "Loss and accuracy on the training pairs look well, while the reward of samples falls "
        "below where it began.",
        "The two columns were exchanged, so the policy learns to write what people disliked.",
        "Read ten pairs aloud, then exchange the columns.",
    ),
    "prompt_scored": Fault(
        "the prompt is scored as part of the completion",
        "Both answers of a pair begin with the same tokens, or log-probs include those of the "
        "prompt.",
        "The completion still has its prompt in front, as the output of model.generate has, or the "
        "mask of completion tokens covers the prompt.",
        "Score the tokens of the completion alone. In the margin the prompt cancels, but not in "
        "averages over tokens, in losses without a reference, or in what is truncated.",
    ),
}

assert tuple(FAULTS) == get_args(FaultName)
