import torch
FORMATS=("fp32","bf16","int8","6bit","4bit")
_D={"fp32":torch.float32,"bf16":torch.bfloat16}
def row_bytes(name,w): return sum(w)*_D[name].itemsize
def encode(name,parts): return torch.cat([p.to(_D[name]) for p in parts],-1).contiguous().view(torch.uint8)
def decode(name,rows,w,dtype): return tuple(x.to(dtype) for x in rows.view(_D[name]).split(list(w),-1))
