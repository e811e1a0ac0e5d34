import ctypes as C, numpy as np, torch, time, statistics as st, subprocess, sys, os
torch.set_num_threads(int(os.environ.get('T','1')))
from bnbx import registry as R
from bnbx.kernels.plan import make_plan
from bnbx.kernels.codebook import tables
from bnbx.kernels.evaluate import evaluate, HOST
FL=os.environ.get('FL','-mprefer-vector-width=512').split()
dt=os.environ.get('DT','float32')
s=R.optimizers().get('adamw'); d=R.quant_types().get('dynamic8')
plan=make_plan(s,{},dt,dt,{x.name:d for x in s.states})
so='/tmp/kb_%d.so'%os.getpid()
r=subprocess.run(['g++','-w','-std=c++17','-O3','-march=native','-ffp-contract=off','-fno-math-errno','-fno-trapping-math',*FL,'-fPIC','-shared',sys.argv[1],'-o',so])
L=C.CDLL(so)
N=int(os.environ.get('N',1<<24)); tdt=getattr(torch,dt)
def al(a):
    b=np.zeros(a.nbytes+64,np.uint8); o=-b.ctypes.data%64; v=b[o:o+a.nbytes]; v[:]=a.view(np.uint8).ravel(); keep.append(b); return v
keep=[]
tabs=[al(tables(x.codebook).pack()) for x in plan.quantized]
tp=np.array([t.ctypes.data for t in tabs],np.int64)
torch.manual_seed(0)
p=(torch.randn(N)*0.02).to(tdt); g=(torch.randn(N)*1e-3).to(tdt)
m=torch.full((N,),127,dtype=torch.uint8); v=torch.zeros(N,dtype=torch.uint8); am=torch.zeros(-(-N//256)); av=torch.zeros(-(-N//256))
nch=-(-N//plan.chunk)
rows=np.array([[p.data_ptr(),g.data_ptr(),m.data_ptr(),am.data_ptr(),v.data_ptr(),av.data_ptr(),N,0],[0]*7+[nch]],np.int64)
sc=np.zeros(len(plan.lowered.scalars),np.float32)
job=np.array([rows.ctypes.data,1,nch,sc.ctypes.data,tp.ctypes.data,C.cast(L.bnbx_update,C.c_void_p).value],np.int64)
gomp=C.CDLL('libgomp.so.1'); par=C.cast(gomp.GOMP_parallel,C.c_void_p)
def step(i):
    h=dict(lr=1e-4,beta1=.9,beta2=.999,eps=1e-8,weight_decay=.01,step=i)
    for x in s.step.statements: h[x.target]=evaluate(x.value,h,HOST)
    sc[:]=[evaluate(e,h,HOST) for e in plan.lowered.scalars.values()]
    L.bnbx_run(C.c_void_p(job.ctypes.data),C.c_int64(1),C.c_int64(torch.get_num_threads()),par)
q=torch.nn.Parameter(p.clone()); q.grad=g; of=torch.optim.AdamW([q],lr=1e-4,fused=True)
t1=[];t2=[]
clk=time.perf_counter
for i in range(1,26):
    g.copy_((torch.randn(1<<16)*1e-3).to(tdt).repeat(N>>16))
    a=clk(); step(i); t1.append(clk()-a)
    a=clk(); of.step(); t2.append(clk()-a)
print(dt,'threads',torch.get_num_threads(),'bnbx med %.3f min %.3f ns/param | torch med %.3f min %.3f | ratio med %.2f pair %.2f'%(st.median(t1)/N*1e9,min(t1)/N*1e9,st.median(t2)/N*1e9,min(t2)/N*1e9,st.median(t1)/st.median(t2), st.median([a/b for a,b in zip(t1,t2)])))
os.unlink(so)
