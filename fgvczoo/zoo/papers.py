"""The papers: what model cards, `info` and imported checkpoints say of them. Importing this imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper of the registry.

    title, authors (in short), venue: as one cites it in a line. url: where it can be read. bibtex: one entry.
    licence: the terms of the authors' code and checkpoints; None where they state none. redistributable: whether these
    terms let their checkpoints be passed on.
    """

    title: str
    authors: str
    venue: str
    url: str
    bibtex: str
    licence: str | None
    redistributable: bool

    def line(self) -> str:
        """Authors, title, venue."""
        return f"{self.authors}, {self.title}, {self.venue}"


PAPERS: dict[str, Paper] = {
    "bas": Paper(
        title="Background Activation Suppression for Weakly Supervised Object Localization and Semantic Segmentation",
        authors="Zhai, Wu et al.",
        venue="IJCV 2023",
        url="https://arxiv.org/abs/2309.12943",
        licence=None,
        redistributable=False,
        bibtex="""\
@article{zhai2023bas,
  title   = {Background Activation Suppression for Weakly Supervised Object Localization and Semantic Segmentation},
  author  = {Zhai, Wei and Wu, Pingyu and Zhu, Kai and Cao, Yang and Wu, Feng and Zha, Zheng-Jun},
  journal = {International Journal of Computer Vision},
  year    = {2023},
  doi     = {10.1007/s11263-023-01919-2}
}""",
    ),
    "dm2": Paper(
        title="Diversified Mutual Learning for Deep Metric Learning",
        authors="Park, Kim et al.",
        venue="ECCV 2020 Workshops",
        url="https://arxiv.org/abs/2009.04170",
        licence=None,
        redistributable=False,
        bibtex="""\
@inproceedings{park2020dm2,
  title     = {Diversified Mutual Learning for Deep Metric Learning},
  author    = {Park, Wonpyo and Kim, Wonjae and You, Kihyun and Cho, Minsu},
  booktitle = {European Conference on Computer Vision Workshops},
  pages     = {709--725},
  year      = {2020}
}""",
    ),
    "dsml": Paper(
        title="Signal-to-Noise Ratio: A Robust Distance Metric for Deep Metric Learning",
        authors="Yuan et al.",
        venue="CVPR 2019",
        url="https://arxiv.org/abs/1904.02616",
        licence=None,
        redistributable=False,
        bibtex="""\
@inproceedings{yuan2019snr,
  title     = {Signal-to-Noise Ratio: A Robust Distance Metric for Deep Metric Learning},
  author    = {Yuan, Tongtong and Deng, Weihong and Tang, Jian and Tang, Yinan and Chen, Binghui},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  pages     = {4815--4824},
  year      = {2019}
}""",
    ),
    "metaformer": Paper(
        title="MetaFormer: A Unified Meta Framework for Fine-Grained Recognition",
        authors="Diao et al.",
        venue="arXiv 2022",
        url="https://arxiv.org/abs/2203.02751",
        licence="MIT",
        redistributable=True,
        bibtex="""\
@article{MetaFormer,
  title   = {MetaFormer: A Unified Meta Framework for Fine-Grained Recognition},
  author  = {Diao, Qishuai and Jiang, Yi and Wen, Bin and Sun, Jia and Yuan, Zehuan},
  journal = {arXiv preprint arXiv:2203.02751},
  year    = {2022}
}""",
    ),
    "protopnet": Paper(
        title="This Looks Like That: Deep Learning for Interpretable Image Recognition",
        authors="Chen, Li et al.",
        venue="NeurIPS 2019",
        url="https://arxiv.org/abs/1806.10574",
        licence="MIT",
        redistributable=True,
        bibtex="""\
@inproceedings{chen2019protopnet,
  title     = {This Looks Like That: Deep Learning for Interpretable Image Recognition},
  author    = {Chen, Chaofan and Li, Oscar and Tao, Chaofan and Barnett, Alina Jade and Su, Jonathan
               and Rudin, Cynthia},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {32},
  year      = {2019}
}""",
    ),
    "prototree": Paper(
        title="Neural Prototype Trees for Interpretable Fine-grained Image Recognition",
        authors="Nauta et al.",
        venue="CVPR 2021",
        url="https://arxiv.org/abs/2012.02046",
        licence="MIT",
        redistributable=True,
        bibtex="""\
@inproceedings{nauta2021prototree,
  title     = {Neural Prototype Trees for Interpretable Fine-grained Image Recognition},
  author    = {Nauta, Meike and van Bree, Ron and Seifert, Christin},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2021}
}""",
    ),
    "st-protopnet": Paper(
        title="Learning Support and Trivial Prototypes for Interpretable Image Classification",
        authors="Wang et al.",
        venue="ICCV 2023",
        url="https://arxiv.org/abs/2301.04011",
        licence="CC BY-NC 4.0",
        redistributable=True,
        bibtex="""\
@inproceedings{wang2023stprotopnet,
  title     = {Learning Support and Trivial Prototypes for Interpretable Image Classification},
  author    = {Wang, Chong and Liu, Yuyuan and Chen, Yuanhong and Liu, Fengbei and Tian, Yu and McCarthy, Davis J.
               and Frazer, Helen and Carneiro, Gustavo},
  booktitle = {IEEE/CVF International Conference on Computer Vision},
  pages     = {2062--2072},
  year      = {2023}
}""",
    ),
}
PAPERS["bas-segmentation"] = PAPERS["bas"]
