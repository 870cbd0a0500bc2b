"""What the 2019 paper (Bae et al., doi 10.4218/etrij.2018-0152) leaves open, as data for the report.

OPEN_OPTIONS says of every field of experiment.Options what the paper says and what the values mean; the values that were used
stand in each record.  CHOICES are the points that have one answer here.
"""
from __future__ import annotations

from typing import NamedTuple


class OpenOption(NamedTuple):
    """An option, what the paper says about it, and what its values mean."""
    name: str
    paper: str
    meaning: str


class Choice(NamedTuple):
    """A point that is settled: what the paper says about it, and what is done here."""
    point: str
    paper: str
    done: str


OPEN_OPTIONS = (
    OpenOption("shortcut",
               "not printed; the networks are those of He et al.",
               "A: without parameters, as in He et al.'s CIFAR networks; B: a 1x1 projection, as in most Caffe ports"),
    OpenOption("mirror",
               "\"the data preprocessing technique of\" He et al., who mirror",
               "whether CIFAR images are mirrored at random"),
    OpenOption("mean",
               "the same; He et al. subtract a mean per pixel",
               "file: per pixel; values: per channel; none"),
    OpenOption("label_tau",
               "equation 2 writes one P_S, softened by tau, for both terms; in Hinton et al. the label term is not softened",
               "temperature of the label term: 1, or tau"),
    OpenOption("tau_squared",
               "no factor is printed; but figure 4's losses, 27.6 to 29.0, are above what equation 2 can give, and tau squared would fit",
               "whether the KD term is multiplied by tau squared"),
    OpenOption("plus_tap",
               "Hint-KD+ trains everything \"except the fully connected layer\"",
               "whether it compares before or after the global pooling"),
    OpenOption("sl_modules",
               "not said whether SL-ResNet's earlier modules go on learning",
               "trainable or frozen while a module is added"),
    OpenOption("regressor_kernel",
               "\"convolutional\" is all that is printed",
               "side of the regressor's kernel in pixels: 1 or 3"),
    OpenOption("regressor_std",
               "\"Gaussian\" is all that is printed",
               "standard deviation of the regressor's first weights"),
    OpenOption("bn_fraction",
               "not printed; 0.999 is Caffe's default",
               "BatchNorm's moving_average_fraction f; a run of scale s < 1 uses 1 - (1 - f) / s, but at least 0.9"),
    OpenOption("mnist_scale",
               "not printed",
               "what an MNIST pixel, 0 to 255, is multiplied by"),
)

CHOICES = (
    Choice("residual modules",
           "\"2n residual modules\" per stack once, against its own depth 6n + 2",
           "n modules per stack; 8, 14, 20, 26, 32 layers are n = 1 to 5"),
    Choice("hint and guided layers",
           "\"three pairs of hint/guided layers, whose feature map dimensions changed\"",
           "the ends of the three stacks of both networks, after the last ReLU"),
    Choice("the middle layer of the original hint training",
           "\"middle layer\"",
           "the end of residual module ceil(3n / 2) of 3n, after its ReLU"),
    Choice("what is published",
           "not said whether of the last or the best iteration",
           "the last one, measured from the saved weights; the best tested one stands beside it"),
    Choice("averages",
           "truncated (91.157 is printed as 91.15)",
           "recomputed from the three nets where these are printed"),
    Choice("seeds",
           "not printed",
           "the teacher, Stage 1 and net k have a seed each, made from the run's seed, the table's, the replication, the role and k, "
           "so that no two roles begin with the same weights; Stage 1 and net k have the same for every method of a table"),
    Choice("what distinguishes the nets",
           "the weights that took no part in Stage 1; for SL-ResNet nothing is said",
           "these and the draws of the augmentation; SL-ResNet's nets have a pretraining each; the original student has three nets, "
           "the teacher one"),
    Choice("images per iteration for MNIST students",
           "64, printed for the teacher",
           "64"),
    Choice("rate of Stage 1",
           "1e-4",
           "1e-4, constant"),
    Choice("momentum and weight decay of Stage 1",
           "not printed",
           "0.9 and 1e-4, as elsewhere; weight decay acts on all that learns"),
    Choice("solver state between steps",
           "not printed",
           "begins anew: each step is a solver run"),
    Choice("scale of the hint loss",
           "equation 1, a squared norm",
           "Caffe's: a sum over the features divided by 2 x batch"),
    Choice("a_i of equation 7",
           "\"all equal\"",
           "1, so that each pair's loss has the weight 1/3"),
    Choice("lambda",
           "5, never said to decay; 3 for SL-ResNet with KD on MNIST",
           "so, and constant"),
    Choice("the teacher while it teaches",
           "not printed",
           "frozen, BatchNorm with its stored statistics"),
    Choice("regressor",
           "Gaussian initialisation, no bias",
           "one per pair, on the guided layer's output, at the student's rate, dropped after Stage 1"),
    Choice("SL-ResNet's steps",
           "12,000 iterations (MNIST 8,000) at a base rate of 0.1",
           "at the constant rate 0.1; each step has a pooling and a fully connected layer of its own"),
    Choice("SL-ResNet's last fully connected layer",
           "that of a step is dropped at the next; not said what becomes of the last one",
           "it goes on into Stage 2, since it stands where the student's own stands"),
    Choice("SL-ResNet's fine-tuning on MNIST",
           "36,000 iterations, once 64,000",
           "36,000"),
    Choice("the teacher of table 6's comparison without regressor",
           "its accuracy is printed nowhere",
           "14 layers of 64, 128 and 256 filters, as in figure 10"),
    Choice("\"averaging the predictions of three trained students\" (figure 5)",
           "their mean accuracy or their ensemble",
           "both: the mean accuracy in every row, and the ensemble of the nets beside it"),
    Choice("normalisation of figure 9",
           "not defined",
           "all losses of a pair are divided by the same number, the largest with which one of the table's methods begins there"),
    Choice("validation",
           "no split is mentioned",
           "none: the last iteration counts, whatever the test set says on the way"),
)
