from .masks import HeadMask as HeadMask
from .restriction import restrict as restrict
from .tuning import finetune as finetune
from .muon import orthogonalize as orthogonalize
from .sift import SIFT as SIFT
from .merging import merge as merge
from .injection import inject as inject
from .comparison import Comparison as Comparison, compare as compare
from .prelogits import aisp as aisp
from .ensemble import RenyiEnsemble as RenyiEnsemble
from .rewards import classifier_reward as classifier_reward, likelihood_reward as likelihood_reward, rowwise as rowwise
from .decoding_baselines import best_of_n as best_of_n
from .decoding_comparison import compare_decoding as compare_decoding
