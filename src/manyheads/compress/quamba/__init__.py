from manyheads.compress.quamba.calibrate import *
from manyheads.compress.quamba.hadamard import *
from manyheads.compress.quamba.quantisers import *
from manyheads.compress.quamba.simulate import *
from manyheads.compress.quamba.sites import *
class Quamba: ...
