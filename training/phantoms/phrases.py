"""The wordings that the report writer chooses from.

`[a|b|c]` stands for one of its parts, chosen at random; `{size}`, `{side}`, `{place}`, `{degree}` and `{density}` are filled in.
"""

from training.phantoms.vocabulary import FindingType, Region

K = FindingType
A_LESION = "[There is|There is|Seen is] a {size} "

PRESENT: dict[FindingType, tuple[str, ...]] = {
    K.LUNG_NODULE: (
        A_LESION + "[solid |][pulmonary |lung |]nodule in the {side} {place}.",
        "[Solid nodule|Nodule|Pulmonary nodule] in the {side} {place}[ measuring|, measuring|, diameter] {size}.",
        "In the {side} {place} [there is|lies] a {size} nodule.",
        "The {side} {place} [contains|shows|harbors] a [solid |]nodule of {size}.",
    ),
    K.LUNG_MASS: (
        A_LESION + "[pulmonary |lung |]mass in the {side} {place}.",
        "[Lobulated |]mass in the {side} {place} measuring {size}.",
        "The {side} {place} [contains|shows|harbors] a {size} mass.",
    ),
    K.CONSOLIDATION: (
        "[There is|] consolidation in the {side} {place}, {size} across.",
        "[Focal |]airspace consolidation [of|in] the {side} {place} measuring {size}.",
        "The {side} {place} shows [a focal|an] area of consolidation of {size}[ with air bronchograms|].",
        "{size} consolidation with air bronchograms in the {side} {place}.",
    ),
    K.ATELECTASIS: (
        "[Linear|Plate-like|Band-like|Subsegmental] atelectasis in the {side} {place}, {size} long.",
        "The {side} {place} shows [linear|plate-like|subsegmental] atelectasis of {size}.",
        "[There is|] {size} [linear|band-like] atelectasis in the {side} {place}.",
    ),
    K.EMPHYSEMA: (
        "{degree} [centrilobular |]emphysema.",
        "[There is|] {degree} [upper lobe predominant |]emphysema[ of both lungs|].",
        "The lungs show {degree} emphysematous change.",
    ),
    K.PLEURAL_EFFUSION: (
        "[There is a|] {side} pleural effusion[ up to| measuring|, maximum depth|, depth] {size}[ deep|].",
        "{side} pleural effusion with a depth of {size}.",
        "[Free-flowing |]pleural effusion on the {side}, {size} in depth.",
        "Pleural fluid on the {side} [measures|reaches] {size} in depth.",
    ),
    K.PNEUMOTHORAX: (
        "[There is a|] {side} pneumothorax[ up to| measuring|, maximum depth] {size}.",
        "{side} [anterior |]pneumothorax with a depth of {size}.",
        "[Anterior |]pneumothorax on the {side}, {size} in depth.",
    ),
    K.PERICARDIAL_EFFUSION: (
        "[There is a|] pericardial effusion[ up to| measuring|, thickness] {size}.",
        "Pericardial effusion with a thickness of {size}.",
        "Pericardial fluid [measures|reaches] {size} in thickness.",
    ),
    K.CARDIOMEGALY: (
        "[The heart|Heart] is enlarged, [transverse diameter|measuring] {size}[ across|].",
        "Cardiomegaly with a transverse cardiac diameter of {size}.",
        "[There is|] cardiomegaly; the heart measures {size} in transverse diameter.",
        "Enlarged heart, {size} in transverse diameter.",
    ),
    K.CORONARY_CALCIFICATION: (
        "{degree} coronary [artery |]calcification.",
        "[There is|] {degree} calcification of the coronary arteries.",
        "{degree} coronary calcifications are present.",
    ),
    K.AORTIC_ANEURYSM: (
        "Aneurysm of the {place} measuring {size}.",
        "[There is|] aneurysmal dilatation of the {place} to {size}.",
        "The {place} is aneurysmal with a diameter of {size}.",
    ),
    K.HEPATIC_CYST: (
        A_LESION + "[simple |][hepatic |]cyst in {place} of the liver.",
        "[Simple |]hepatic cyst in {place}[ measuring|, measuring|,] {size}.",
        "{place} of the liver [contains|shows] a {size} cyst.",
        "Liver: [simple |]cyst of {size} in {place}.",
    ),
    K.HEPATIC_LESION: (
        A_LESION + "{density} [hepatic |][solid |]lesion in {place} of the liver.",
        "{density} [solid |]hepatic lesion in {place}[ measuring|, measuring|,] {size}.",
        "{place} of the liver [contains|shows] a {density} lesion of {size}.",
        "Liver: {density} [focal |]lesion of {size} in {place}.",
    ),
    K.STEATOSIS: (
        "{degree} hepatic steatosis.",
        "[There is|] {degree} [diffuse |]fatty infiltration of the liver.",
        "{degree} steatosis of the liver.",
    ),
    K.GALLSTONES: (
        "Gallstones, the largest [measuring |]{size}.",
        "Cholelithiasis with stones up to {size}.",
        "The gallbladder contains stones measuring up to {size}.",
    ),
    K.SPLENOMEGALY: (
        "Splenomegaly[ measuring|, measuring|,] {size} [in length|in craniocaudal length|craniocaudally].",
        "The spleen is enlarged, [measuring |]{size} in [length|craniocaudal length].",
        "Enlarged spleen with a craniocaudal length of {size}.",
        "[There is|] splenomegaly of {size}.",
    ),
    K.RENAL_CYST: (
        A_LESION + "[simple |cortical |]cyst in the {place} of the {side} kidney.",
        "{side} renal cyst in the {place}[ measuring|,] {size}.",
        "The {place} of the {side} kidney contains a {size} cyst.",
    ),
    K.RENAL_CALCULUS: (
        A_LESION + "[calculus|stone] in the {place} of the {side} kidney.",
        "{side} renal calculus in the {place}[ measuring|,] {size}.",
        "[Nonobstructing |]{side} kidney stone in the {place}, {size}.",
        "The {place} of the {side} kidney contains a {size} calculus.",
    ),
    K.HYDRONEPHROSIS: (
        "{side} hydronephrosis, renal pelvis [measuring |]{size}.",
        "[There is|] {side} hydronephrosis with a renal pelvis of {size}.",
        "Hydronephrosis [on|of] the {side}[ kidney|], pelvis dilated to {size}.",
        "Dilated collecting system of the {side} kidney, {size} at the pelvis.",
    ),
    K.PANCREATIC_MASS: (
        A_LESION + "[hypodense |]mass in the pancreatic {place}.",
        "[Hypodense |]pancreatic mass in the {place} measuring {size}.",
        "The {place} of the pancreas contains a {size} mass.",
    ),
    K.ASCITES: (
        "Ascites[ up to| with a depth of|, maximum depth] {size}.",
        "[There is|] ascites measuring {size} in depth.",
        "Free peritoneal fluid up to {size} in depth.",
        "[Perihepatic and perisplenic |]ascites, {size} deep.",
    ),
    K.BLADDER_STONE: (
        "[Urinary |]bladder stone [measuring|of] {size}.",
        A_LESION + "[calculus|stone] in the [urinary |]bladder.",
        "The urinary bladder contains a {size} calculus.",
    ),
    K.VERTEBRAL_FRACTURE: (
        "{degree} [compression |wedge |]fracture of {place}.",
        "[There is a|] {degree} [compression |wedge |]fracture of the {place} vertebral body.",
        "{place} shows [a |]{degree} [compression|wedge] fracture.",
        "{degree} loss of height of the {place} vertebral body.",
    ),
    K.LYTIC_LESION: (
        "Lytic [bone |]lesion in {place} measuring {size}.",
        A_LESION + "lytic [bone |]lesion in {place}.",
        "{place} contains a lytic lesion of {size}.",
    ),
    K.LYMPHADENOPATHY: (
        "{place} lymphadenopathy with nodes up to {size} in short axis.",
        "Enlarged {place} lymph nodes, the largest {size} in short axis.",
        "[There is|] {place} lymphadenopathy, short axis up to {size}.",
    ),
}
"""Sentences that state a finding in the Findings section."""

BILATERAL: dict[FindingType, tuple[str, ...]] = {
    K.PLEURAL_EFFUSION: (
        "[There are b|B]ilateral pleural effusions, {size} deep on the right and {other} on the left.",
        "Pleural effusions on both sides, {size} on the right and {other} on the left.",
    ),
    K.PNEUMOTHORAX: ("Bilateral pneumothorax, {size} on the right and {other} on the left.",),
    K.HYDRONEPHROSIS: ("Bilateral hydronephrosis, renal pelvis {size} on the right and {other} on the left.",),
}
"""Sentences for a paired kind that is present on both sides."""

IN_SHORT: dict[FindingType, tuple[str, ...]] = {
    K.LUNG_NODULE: ("{side} {place} [pulmonary |]nodule, {size}.", "{size} nodule in the {side} {place}."),
    K.LUNG_MASS: ("{side} {place} lung mass, {size}.", "{size} mass in the {side} {place}."),
    K.CONSOLIDATION: (
        "{side} {place} consolidation.",
        "Consolidation of the {side} {place}[, compatible with pneumonia|].",
    ),
    K.ATELECTASIS: ("{side} {place} atelectasis.",),
    K.EMPHYSEMA: ("{degree} emphysema.",),
    K.PLEURAL_EFFUSION: ("{side} pleural effusion[, {size}|].", "Pleural effusion on the {side}."),
    K.PNEUMOTHORAX: ("{side} pneumothorax[, {size}|].",),
    K.PERICARDIAL_EFFUSION: ("Pericardial effusion[, {size}|].",),
    K.CARDIOMEGALY: ("Cardiomegaly.", "Enlarged heart."),
    K.CORONARY_CALCIFICATION: ("{degree} coronary calcification.",),
    K.AORTIC_ANEURYSM: ("Aneurysm of the {place}, {size}.",),
    K.HEPATIC_CYST: ("[Simple h|H]epatic cyst[ in {place}|, {size}|].",),
    K.HEPATIC_LESION: ("{density} hepatic lesion in {place}[, {size}|].",),
    K.STEATOSIS: ("{degree} hepatic steatosis.",),
    K.GALLSTONES: ("Cholelithiasis.", "Gallstones."),
    K.SPLENOMEGALY: ("Splenomegaly[, {size}|].", "Enlarged spleen."),
    K.RENAL_CYST: ("{side} renal cyst[, {size}|].",),
    K.RENAL_CALCULUS: ("{side} renal calculus[, {size}|].", "{side} nephrolithiasis."),
    K.HYDRONEPHROSIS: ("{side} hydronephrosis.", "Hydronephrosis on the {side}."),
    K.PANCREATIC_MASS: ("Mass in the pancreatic {place}, {size}.",),
    K.ASCITES: ("Ascites.",),
    K.BLADDER_STONE: ("Bladder stone[, {size}|].",),
    K.VERTEBRAL_FRACTURE: ("{degree} [compression |]fracture of {place}.", "{place} [compression |wedge ]fracture."),
    K.LYTIC_LESION: ("Lytic lesion in {place}.",),
    K.LYMPHADENOPATHY: ("{place} lymphadenopathy.",),
}
"""Sentences that repeat a finding in the Impression."""

TOPICS: dict[Region, tuple[tuple[tuple[FindingType, ...], tuple[str, ...]], ...]] = {
    Region.CHEST: (
        (
            (K.LUNG_NODULE, K.LUNG_MASS, K.CONSOLIDATION, K.ATELECTASIS, K.EMPHYSEMA),
            (
                "The lungs are clear.",
                "Lungs are clear [without|with no] nodule or consolidation.",
                "No [suspicious |]pulmonary nodule, mass or consolidation.",
                "[Clear lungs|Lungs without focal opacity].",
            ),
        ),
        (
            (K.PLEURAL_EFFUSION, K.PNEUMOTHORAX),
            (
                "No pleural effusion or pneumothorax.",
                "[There is no|No evidence of] pleural effusion or pneumothorax.",
                "Pleural spaces are clear; no effusion, no pneumothorax.",
                "No pneumothorax. No pleural effusion.",
            ),
        ),
        (
            (K.CARDIOMEGALY, K.PERICARDIAL_EFFUSION, K.CORONARY_CALCIFICATION),
            (
                "[The heart|Heart] is normal in size.",
                "Heart size is normal [without|with no] pericardial effusion.",
                "No cardiomegaly. No pericardial effusion.",
                "The heart is not enlarged.",
            ),
        ),
        (
            (K.LYMPHADENOPATHY, K.AORTIC_ANEURYSM),
            (
                "No mediastinal lymphadenopathy.",
                "[The mediastinum is unremarkable|Unremarkable mediastinum].",
                "No enlarged mediastinal [or hilar |]lymph nodes.",
                "The thoracic aorta is normal in caliber. No mediastinal lymphadenopathy.",
            ),
        ),
        (
            (K.VERTEBRAL_FRACTURE, K.LYTIC_LESION),
            (
                "No thoracic vertebral fracture.",
                "Thoracic vertebral body heights are [maintained|preserved].",
                "Thoracic spine without fracture or lytic lesion.",
            ),
        ),
    ),
    Region.ABDOMEN: (
        (
            (K.HEPATIC_CYST, K.HEPATIC_LESION, K.STEATOSIS),
            (
                "The liver is [normal|unremarkable].",
                "Liver without focal lesion.",
                "No focal hepatic lesion.",
                "The liver shows no cyst or solid lesion.",
            ),
        ),
        (
            (K.GALLSTONES,),
            ("The gallbladder is unremarkable.", "No gallstones.", "Gallbladder without stones."),
        ),
        (
            (K.SPLENOMEGALY,),
            ("The spleen is normal in size.", "Spleen is [normal|not enlarged].", "No splenomegaly."),
        ),
        (
            (K.PANCREATIC_MASS,),
            ("The pancreas is [normal|unremarkable].", "No pancreatic mass.", "Pancreas without focal lesion."),
        ),
        (
            (K.RENAL_CYST, K.RENAL_CALCULUS, K.HYDRONEPHROSIS),
            (
                "The kidneys are [normal|unremarkable].",
                "No hydronephrosis or renal calculus.",
                "Kidneys without stone or hydronephrosis.",
                "No renal calculi. No hydronephrosis.",
            ),
        ),
        (
            (K.ASCITES,),
            ("No ascites.", "No free [fluid|peritoneal fluid].", "[There is no|No evidence of] ascites."),
        ),
        (
            (K.LYMPHADENOPATHY, K.AORTIC_ANEURYSM),
            (
                "No retroperitoneal lymphadenopathy.",
                "The abdominal aorta is normal in caliber.",
                "No enlarged retroperitoneal lymph nodes; the abdominal aorta is not dilated.",
            ),
        ),
        (
            (K.VERTEBRAL_FRACTURE, K.LYTIC_LESION),
            (
                "No lumbar vertebral fracture.",
                "Lumbar vertebral body heights are [maintained|preserved].",
                "Lumbar spine without fracture.",
            ),
        ),
    ),
    Region.PELVIS: (
        (
            (K.BLADDER_STONE,),
            ("The urinary bladder is unremarkable.", "No bladder stone.", "Urinary bladder without calculus."),
        ),
        ((K.LYMPHADENOPATHY,), ("No pelvic lymphadenopathy.", "No enlarged pelvic lymph nodes.")),
        ((K.LYTIC_LESION,), ("The pelvic bones are unremarkable.", "No lytic lesion of the pelvis.")),
    ),
}
"""By region, what is looked at in order: the kinds of finding, and how their absence is written."""

ABSENT: dict[FindingType, tuple[str, ...]] = {
    K.LUNG_NODULE: ("No pulmonary nodule.", "There is no pulmonary nodule."),
    K.CONSOLIDATION: ("No consolidation.", "No airspace consolidation."),
    K.PLEURAL_EFFUSION: ("No pleural effusion.", "There is no pleural effusion."),
    K.PNEUMOTHORAX: ("No pneumothorax.", "There is no pneumothorax."),
    K.CARDIOMEGALY: ("Heart size is normal.", "No cardiomegaly."),
    K.PERICARDIAL_EFFUSION: ("No pericardial effusion.",),
    K.HYDRONEPHROSIS: ("No hydronephrosis.", "The collecting systems are not dilated."),
    K.RENAL_CALCULUS: ("No renal calculus.", "No kidney stone."),
    K.HEPATIC_LESION: ("No solid hepatic lesion.", "No suspicious liver lesion."),
}
"""How the absence of one kind is written where another of its topic is present."""

NOTHING = (
    "No [significant |acute |]abnormality[ of the {regions}|].",
    "[Unremarkable|Normal] CT of the {regions}.",
    "No evidence of disease in the {regions}.",
)
"""The Impression of a normal case."""
