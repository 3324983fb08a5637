import torch,sys; torch.set_num_threads(1)
from tests.conftest import *
import pytest
from trl import DPOTrainer, DPOConfig
from hfnoise import *
@pytest.mark.parametrize("cls", ["trl","ours"])
def test_x(make_pairs, tiny_model_path, tokenizer, cpu_arguments, cls):
    s={"per_device_train_batch_size": 2,"gradient_accumulation_steps": 2, "max_steps": 11, "save_strategy": "steps", "save_steps": 3}
    T,C=(DPOTrainer,DPOConfig) if cls=="trl" else (NoiseDPOTrainer,NoiseDPOConfig)
    def made(): return T(tiny_model_path,args=C(**cpu_arguments|s),train_dataset=make_pairs(26).to_iterable_dataset(),processing_class=tokenizer)
    w=made(); w.train(); ws={k:v.clone() for k,v in w.model.state_dict().items()}
    l0=[e["loss"] for e in w.state.log_history if "loss" in e]
    for st in (3,6,9):
        r=made(); r.train(resume_from_checkpoint=f"{w.args.output_dir}/checkpoint-{st}")
        l1=[e["loss"] for e in r.state.log_history if "loss" in e]
        print("RES",cls,st,l0[st:],l1[-(11-st):],all(torch.equal(v,ws[k]) for k,v in r.model.state_dict().items()))
