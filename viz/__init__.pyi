from .heatmaps import heatmap as heatmap
from .flows import flow as flow
from .texts import attention as attention, tokens as tokens
from .pairs import compare as compare
from .curves import faithful as faithful, training as training
from .gates import gating as gating
from .spectra import interference as interference, spectrum as spectrum
from .decode import decoding as decoding
from .routes import routing as routing
from .page import report as report
