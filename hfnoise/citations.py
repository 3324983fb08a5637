"""Citations of the papers whose methods are here, for cards and the paper index."""

ROBUST_DPO_BIBTEX = """\
@inproceedings{chowdhury2024provably,
    title     = {{Provably Robust DPO: Aligning Language Models with Noisy Feedback}},
    author    = {Sayak Ray Chowdhury and Anush Kini and Nagarajan Natarajan},
    booktitle = {Proceedings of the 41st International Conference on Machine Learning},
    year      = {2024},
    url       = {https://arxiv.org/abs/2403.00409},
}"""

DR_DPO_BIBTEX = """\
@inproceedings{wu2025towards,
    title     = {{Towards Robust Alignment of Language Models: Distributionally Robustifying Direct Preference
                 Optimization}},
    author    = {Junkang Wu and Yuexiang Xie and Zhengyi Yang and Jiancan Wu and Jiawei Chen and Jinyang Gao and
                 Bolin Ding and Xiang Wang and Xiangnan He},
    booktitle = {The Thirteenth International Conference on Learning Representations},
    year      = {2025},
    url       = {https://arxiv.org/abs/2407.07880},
}"""

BVPO_BIBTEX = """\
@article{zhu2025from,
    title   = {{From Noisy Traces to Stable Gradients: Bias-Variance Optimized Preference Optimization for Aligning
               Large Reasoning Models}},
    author  = {Mingkang Zhu and Xi Chen and Bei Yu and Hengshuang Zhao and Jiaya Jia},
    year    = {2025},
    eprint  = {arXiv:2510.05095},
}"""

DP_SGD_BIBTEX = """\
@inproceedings{abadi2016deep,
    title     = {{Deep Learning with Differential Privacy}},
    author    = {Mart{\\'i}n Abadi and Andy Chu and Ian Goodfellow and H. Brendan McMahan and Ilya Mironov and
                 Kunal Talwar and Li Zhang},
    booktitle = {Proceedings of the 2016 ACM SIGSAC Conference on Computer and Communications Security},
    year      = {2016},
    url       = {https://arxiv.org/abs/1607.00133},
}"""

PLD_BIBTEX = """\
@article{doroshenko2022connect,
    title   = {{Connect the Dots: Tighter Discrete Approximations of Privacy Loss Distributions}},
    author  = {Vadym Doroshenko and Badih Ghazi and Pritish Kamath and Ravi Kumar and Pasin Manurangsi},
    journal = {Proceedings on Privacy Enhancing Technologies},
    year    = {2022},
    url     = {https://arxiv.org/abs/2207.04380},
}"""

RDP_BIBTEX = """\
@inproceedings{mironov2017renyi,
    title     = {{R{\\'e}nyi Differential Privacy}},
    author    = {Ilya Mironov},
    booktitle = {IEEE 30th Computer Security Foundations Symposium},
    year      = {2017},
    url       = {https://arxiv.org/abs/1702.07476},
}"""

AUTOMATIC_CLIPPING_BIBTEX = """\
@inproceedings{bu2023automatic,
    title     = {{Automatic Clipping: Differentially Private Deep Learning Made Easier and Stronger}},
    author    = {Zhiqi Bu and Yu-Xiang Wang and Sheng Zha and George Karypis},
    booktitle = {Advances in Neural Information Processing Systems},
    year      = {2023},
    url       = {https://arxiv.org/abs/2206.07136},
}"""

BANDED_NOISE_BIBTEX = """\
@inproceedings{choquette2023amplified,
    title     = {{(Amplified) Banded Matrix Factorization: A Unified Approach to Private Training}},
    author    = {Christopher A. Choquette-Choo and Arun Ganesh and Ryan McKenna and H. Brendan McMahan and Keith Rush
                 and Abhradeep Guha Thakurta and Zheng Xu},
    booktitle = {Advances in Neural Information Processing Systems},
    year      = {2023},
    url       = {https://arxiv.org/abs/2306.08153},
}"""

DP_ADAM_BC_BIBTEX = """\
@inproceedings{tang2024dpadambc,
    title     = {{DP-AdamBC: Your DP-Adam Is Actually DP-SGD (Unless You Apply Bias Correction)}},
    author    = {Qiaoyue Tang and Frederick Shpilevskiy and Mathias L{\\'e}cuyer},
    booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
    year      = {2024},
    url       = {https://arxiv.org/abs/2312.14334},
}"""

AUDIT_BIBTEX = """\
@inproceedings{steinke2023privacy,
    title     = {{Privacy Auditing with One (1) Training Run}},
    author    = {Thomas Steinke and Milad Nasr and Matthew Jagielski},
    booktitle = {Advances in Neural Information Processing Systems},
    year      = {2023},
    url       = {https://arxiv.org/abs/2305.08846},
}"""

FEDSVD_BIBTEX = """\
@inproceedings{lee2025fedsvd,
    title     = {{FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA}},
    author    = {Seanie Lee and Sangwoo Park and Dong Bok Lee and Dominik Wagner and Haebin Seong and Tobias Bocklet
                 and Juho Lee and Sung Ju Hwang},
    booktitle = {Advances in Neural Information Processing Systems},
    year      = {2025},
    url       = {https://arxiv.org/abs/2505.12805},
}"""

QUEST_BIBTEX = """\
@misc{panferov2025quest,
    title         = {{QuEST: Stable Training of LLMs with 1-Bit Weights and Activations}},
    author        = {Andrei Panferov and Jiale Chen and Soroush Tabesh and Roberto L. Castro and Mahdi Nikdan
                     and Dan Alistarh},
    year          = {2025},
    eprint        = {2502.05003},
    archivePrefix = {arXiv},
    url           = {https://arxiv.org/abs/2502.05003},
}"""

ADAPTIVE_GUIDANCE_BIBTEX = """\
@inproceedings{castillo2025adaptive,
    title     = {{Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models}},
    author    = {Angela Castillo and Jonas Kohler and Juan C. P{\\'e}rez and Juan Pablo P{\\'e}rez and
                 Albert Pumarola and Bernard Ghanem and Pablo Arbel{\\'a}ez and Ali Thabet},
    booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
    year      = {2025},
    url       = {https://arxiv.org/abs/2312.12487},
}"""

APG_BIBTEX = """\
@inproceedings{sadat2025eliminating,
    title     = {{Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models}},
    author    = {Seyedmorteza Sadat and Otmar Hilliges and Romann M. Weber},
    booktitle = {The Thirteenth International Conference on Learning Representations},
    year      = {2025},
    url       = {https://arxiv.org/abs/2410.02416},
}"""

ONE_MORE_STEP_BIBTEX = """\
@inproceedings{hu2024one,
    title     = {{One More Step: A Versatile Plug-and-Play Module for Rectifying Diffusion Schedule Flaws and
                 Enhancing Low-Frequency Controls}},
    author    = {Minghui Hu and Jianbin Zheng and Chuanxia Zheng and Chaoyue Wang and Dacheng Tao and Tat-Jen Cham},
    booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
    pages     = {7331--7340},
    year      = {2024},
    url       = {https://arxiv.org/abs/2311.15744},
}"""

GOLDEN_NOISE_BIBTEX = """\
@inproceedings{zhou2025golden,
    title     = {{Golden Noise for Diffusion Models: A Learning Framework}},
    author    = {Zikai Zhou and Shitong Shao and Lichen Bai and Shufei Zhang and Zhiqiang Xu and Bo Han and Zeke Xie},
    booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
    year      = {2025},
    url       = {https://arxiv.org/abs/2411.09502},
}"""
