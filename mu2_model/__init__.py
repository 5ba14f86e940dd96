"""μ²LLM: a CT volume and a question in, a draft report out. Stands alone: no hospital system is needed to use it.

Importing the package registers its classes with transformers' Auto classes, so that
`AutoModelForImageTextToText.from_pretrained(folder)` and `AutoProcessor.from_pretrained(folder)` find them; nothing else
happens at import.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

from mu2_model.configuration_mu2 import Mu2Config, Mu2TokenizerConfig, Mu2VisionConfig
from mu2_model.image_processing_mu2 import Mu2ImageProcessor
from mu2_model.modeling_mu2 import Mu2ForConditionalGeneration, Mu2Model
from mu2_model.processing_mu2 import Mu2Processor

AutoConfig.register(Mu2Config.model_type, Mu2Config)
AutoModel.register(Mu2Config, Mu2Model)
AutoModelForImageTextToText.register(Mu2Config, Mu2ForConditionalGeneration)
AutoImageProcessor.register(Mu2Config, slow_image_processor_class=Mu2ImageProcessor)
AutoProcessor.register(Mu2Config, Mu2Processor)

__all__ = [
    "Mu2Config",
    "Mu2ForConditionalGeneration",
    "Mu2ImageProcessor",
    "Mu2Model",
    "Mu2Processor",
    "Mu2TokenizerConfig",
    "Mu2VisionConfig",
]
