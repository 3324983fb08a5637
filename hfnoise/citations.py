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
