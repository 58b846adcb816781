import torch, torch.nn.functional as F
from peft_kernels import rms_norm as _rms, lora_linear
def attention(q,k,v,*,scale,cos=None,sin=None,interleaved=False,causal=True,window=0,spans=None,keep=None,bias=None,slopes=None,softcap=0.0,sinks=None):
    B,T,H,D=q.shape; S,G=k.shape[1],k.shape[2]
    if cos is not None:
        def turn(x):
            R=cos.shape[-1]; p=x[...,:R].double() if x.dtype==torch.float64 else x[...,:R].float()
            if interleaved:
                a=p.unflatten(-1,(-1,2)); rot=torch.stack((-a[...,1],a[...,0]),-1).flatten(-2)
            else:
                a,b=p.chunk(2,-1); rot=torch.cat((-b,a),-1)
            return torch.cat(((p*cos.unsqueeze(2)+rot*sin.unsqueeze(2)).to(x.dtype),x[...,R:]),-1)
        q,k=turn(q),turn(k)
    dt=q.dtype; q,k,v=(t.transpose(1,2).float() for t in (q,k,v))
    k=k.repeat_interleave(H//G,1); v=v.repeat_interleave(H//G,1)
    s=q@k.transpose(-1,-2)*scale
    if slopes is not None: s=s+slopes.view(1,-1,1,1)*torch.arange(k.shape[2])
    if softcap: s=softcap*torch.tanh(s/softcap)
    seen=torch.ones(1,1,T,S,dtype=torch.bool)
    j=torch.arange(S); i=torch.arange(T)[:,None]+S-T
    if causal: seen=seen&(j<=i)
    if window: seen=seen&(j>i-window)
    if spans is not None: seen=seen&((j>=spans[...,0:1])&(j<spans[...,1:2])).unsqueeze(1)
    if keep is not None: seen=seen&keep.unsqueeze(1)
    s=s.masked_fill(~seen,-torch.inf)
    if sinks is not None: s=torch.cat((s,sinks.float().view(1,-1,1,1).expand(B,-1,T,1)),-1)
    p=torch.softmax(s,-1).nan_to_num(0)
    if sinks is not None: p=p[...,:-1]
    return (p@v).transpose(1,2).to(dt)
ACT=dict(silu=F.silu,gelu=F.gelu,gelu_tanh=lambda x:F.gelu(x,approximate="tanh"),quick_gelu=lambda x:x*torch.sigmoid(1.702*x),relu=F.relu,relu2=lambda x:F.relu(x)**2)
def gated(gate,up=None,act="silu"):
    h=ACT[act](gate.float()); return (h if up is None else h*up.float()).to(gate.dtype)
def gated_mlp(x,gate,up,down,act="silu",halves=False):
    g=lora_linear(x,*gate)
    if halves: h=gated(*g.chunk(2,-1),act=act)
    else: h=gated(g,None if up is None else lora_linear(x,*up),act=act)
    return lora_linear(h,*down)
def layer_norm(x,weight,bias,eps,offset=0.0):
    w=None if weight is None else (weight.float()+offset)
    return F.layer_norm(x.float(),x.shape[-1:],w,None if bias is None else bias.float(),eps).to(x.dtype)
def rms_norm(x,weight,eps,offset=0.0):
    y=x.float(); y=y*torch.rsqrt(y.pow(2).mean(-1,keepdim=True)+eps)
    if weight is not None: y=y*(weight.float()+offset)
    return y.to(x.dtype)
