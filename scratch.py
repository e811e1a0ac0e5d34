import time, sys
from bnbx import registry as R
from bnbx.kernels.plan import make_plan
from bnbx.kernels.source import render
s=R.optimizers().get(sys.argv[1] if len(sys.argv)>1 else 'adamw'); d=R.quant_types().get(sys.argv[2] if len(sys.argv)>2 else 'dynamic8')
sw={k:True for k in s.switches}
t=time.time()
src=render(make_plan(s,sw,sys.argv[3] if len(sys.argv)>3 else 'float32',sys.argv[3] if len(sys.argv)>3 else 'float32',{x.name:d for x in s.states}),(sys.argv[4] if len(sys.argv)>4 else 'optimizer.cpp.j2'))
open('/tmp/k.cpp','w').write(src); print(time.time()-t)
